"""What an engine's process finds, over trees laid out as the CUDA wheels are; linked with the machine's own c++."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

from rollouts.worker import engine_tools
from rollouts.worker.engine_tools import with_tools
from tests.worker.stands import Host, log, process, script, stage

HOST_PATH = "/usr/bin:/bin"


@pytest.fixture(autouse=True)
def nothing_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a toolkit at the usual place, whatever this machine has there."""
    monkeypatch.setattr(engine_tools, "USUAL_TOOLKIT", "/nowhere/cuda")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An environment with the files of nvidia-cuda-nvcc, nvidia-cuda-runtime and nvidia-nvvm where their wheels put
    them: lib, not lib64, and a library under its versioned name alone."""
    made = tmp_path / "env"
    packages = made / "lib" / "python3.11" / "site-packages"
    for name in (
        "bin/nvcc",
        "bin/ptxas",
        "include/cuda_runtime.h",
        "include/cccl/cuda/std/cstdint",
        "nvvm/bin/cicc",
    ):
        file = packages / "nvidia" / "cu13" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    (packages / "nvidia_cuda_runtime-13.0.96.dist-info").mkdir()
    (made / "bin").mkdir()
    library = packages / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    (library.parent / "libcudart_static.a").touch()
    source = tmp_path / "cudart.cpp"
    source.write_text(
        'extern "C" int cudaRuntimeGetVersion(int *version) { *version = 424242; return 0; }\n'
    )
    build = [
        "c++",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcudart.so.13",
        "-o",
        str(library),
        str(source),
    ]
    subprocess.run(build, check=True)
    return made


def toolkit(place: Path, release: str, *, whole: bool = True) -> Path:
    """A toolkit of the host: its nvcc says the release."""
    (place / "bin").mkdir(parents=True)
    (place / "lib64").mkdir()
    if whole:
        (place / "lib64" / "libcudart.so").touch()
    nvcc = place / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.88"\n')
    nvcc.chmod(0o755)
    return place


def test_a_kernel_is_linked_against_the_wheels(root: Path, tmp_path: Path) -> None:
    """Goal: the flags that engines link with, and loading what was linked, work on a host without a toolkit. Red with
    CUDA_HOME at the wheels themselves: no lib64, and no libcudart.so."""
    made = with_tools({"PATH": HOST_PATH}, root, declared={})
    home = Path(made["CUDA_HOME"])
    assert home == root / "cuda-home" and made["CUDA_PATH"] == made["CUDA_HOME"]
    assert made["PATH"] == f"{root}/bin:{home}/bin:{HOST_PATH}"
    for name in (
        "bin/nvcc",
        "include/cuda_runtime.h",
        "nvvm/bin/cicc",
        "lib/libcudart.so",
        "lib64/libcudart_static.a",
    ):
        assert (home / name).is_file()
    source, linked = tmp_path / "k.cpp", tmp_path / "k.so"
    call = 'extern "C" int cudaRuntimeGetVersion(int *);\n'
    source.write_text(
        f'{call}extern "C" int v() {{ int n; cudaRuntimeGetVersion(&n); return n; }}\n'
    )
    build = [
        "c++",
        "-shared",
        "-fPIC",
        str(source),
        f"-L{home}/lib64",
        "-lcudart",
        "-o",
        str(linked),
    ]
    subprocess.run(build, check=True, env=made)
    read = f"import ctypes; print(ctypes.CDLL({str(linked)!r}).v())"
    # As torch_memory_saver's library does: it needs libcudart.so.13, and says no path to it
    done = subprocess.run(
        ["python3", "-c", read], env=made, capture_output=True, text=True, check=True
    )
    assert done.stdout == "424242\n"


def test_made_once_and_alike(root: Path) -> None:
    """Goal: the same links whoever makes them and however often; two at a time do not disturb each other, and nothing
    is left beside them. Red with the directory removed and made anew each time."""
    made: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: made.append(
                with_tools({"PATH": HOST_PATH}, root, declared={})["CUDA_HOME"]
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    home = root / "cuda-home"
    assert made == [str(home)] * 8
    before = home.stat().st_ino
    with_tools({"PATH": HOST_PATH}, root, declared={})
    assert home.stat().st_ino == before and not [
        name for name in os.listdir(root) if name.startswith(".cuda-home")
    ]
    (home / "lib64" / "libcudart.so").unlink()  # an older layout, or a damaged one
    with_tools({"PATH": HOST_PATH}, root, declared={})
    assert (home / "lib64" / "libcudart.so").is_file()


@pytest.mark.parametrize(
    ("release", "whole", "taken"),
    [
        ("13.0", True, True),
        ("13.2", True, True),
        ("12.8", True, False),
        ("14.0", True, False),
        ("13.2", False, False),
    ],
)
def test_the_hosts_own_toolkit(
    root: Path, tmp_path: Path, release: str, whole: bool, taken: bool
) -> None:
    """Goal: a whole toolkit of the same major version, not older than the environment's runtime, is taken; else the
    wheels'. Red with any nvcc on PATH taken: 12.8 cannot compile against headers of 13."""
    place = toolkit(tmp_path / "own", release, whole=whole)
    for told in (
        {"PATH": f"{place}/bin:{HOST_PATH}"},
        {"PATH": HOST_PATH, "CUDA_HOME": str(place)},
    ):
        made = with_tools(told, root, declared={})
        assert made["CUDA_HOME"] == str(place if taken else root / "cuda-home")


def test_what_the_config_says_stays(root: Path) -> None:
    """Goal: CUDA_HOME of host.env is not looked at again. Red with it overwritten."""
    told = {"PATH": HOST_PATH, "CUDA_HOME": "/mine", "LD_LIBRARY_PATH": "/theirs"}
    made = with_tools(told, root, declared={"CUDA_HOME": "/mine"})
    assert made["CUDA_HOME"] == "/mine" and made["PATH"] == f"{root}/bin:{HOST_PATH}"
    assert (
        made["LD_LIBRARY_PATH"].endswith("/nvidia/cu13/lib:/theirs")
        and not (root / "cuda-home").exists()
    )


def test_an_environment_without_cuda(tmp_path: Path) -> None:
    """Goal: a CPU's gets its programs on PATH, and nothing of CUDA. Red with LD_LIBRARY_PATH set in any case."""
    # CUDA 12 has no directory of all
    (tmp_path / "lib/python3.11/site-packages/nvidia/cublas/lib").mkdir(parents=True)
    assert with_tools({"PATH": HOST_PATH}, tmp_path, declared={}) == {
        "PATH": f"{tmp_path}/bin:{HOST_PATH}"
    }


def test_the_process_has_them(host: Host, root: Path) -> None:
    """Goal: a window whose plan names an environment gives its process that environment's tools; another does not.
    Red with the window's variables as they were."""
    show = "import os; print(os.environ['PATH'].split(':')[0], os.environ.get('CUDA_HOME') != None)"
    with_them = process("trainer", script(show), tools_of=str(root))
    assert log(host.finish(stage("sft", with_them)), "trainer") == f"{root}/bin True\n"
