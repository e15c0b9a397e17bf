"""What an engine's process finds: the programs of its environment, and a CUDA toolkit to compile kernels with.

SGLang and FlashInfer build kernels when they first need them. They call ninja from PATH and nvcc from CUDA_HOME, and
link with -L$CUDA_HOME/lib64 -lcudart. A lock brings all of it as wheels, under site-packages/nvidia/cu13, where nobody
looks and whose lib has libcudart.so.13 alone. So a directory of links gives it a toolkit's shape:

    <environment>/cuda-home/{bin,include,nvvm} -> the wheels'   lib64/libcudart.so -> …/lib/libcudart.so.13

The host's own toolkit is taken where it is new enough. Standard library only.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

CUDA_HOME = "cuda-home"
CUDA_DIRECTORY = re.compile(r"cu(\d+)")
LIBRARY = re.compile(r"(lib.+\.so)(?:\.\d+)+")
RELEASE = re.compile(r"release (\d+)\.(\d+)")
CUDART = re.compile(r"nvidia_cuda_runtime-(\d+)\.(\d+)[\d.]*\.dist-info")
USUAL_TOOLKIT = "/usr/local/cuda"  # where engines look by themselves
DRIVER_LIBRARIES = (
    "/usr/lib/*-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
)
NVCC_TIMEOUT_S = 30.0


def with_tools(
    environment: Mapping[str, str], root: Path, *, declared: Mapping[str, str]
) -> dict[str, str]:
    """Return a process's variables with what the environment at `root` has; `declared` ones stay as they are.

    Makes the toolkit's links where they are missing. Raises OSError when they cannot be made.
    """
    made = {**environment, "PATH": _joined(str(root / "bin"), environment.get("PATH", os.defpath))}
    wheels = cuda_wheels(root)
    if wheels is None:
        return made
    made["LD_LIBRARY_PATH"] = _joined(str(wheels / "lib"), environment.get("LD_LIBRARY_PATH", ""))
    if "CUDA_HOME" not in declared:
        toolkit = host_toolkit(environment, at_least=_runtime_version(wheels))
        if toolkit is None and (wheels / "bin" / "nvcc").is_file():
            toolkit = link_toolkit(root, wheels)
        if toolkit is not None:
            made["CUDA_HOME"] = made["CUDA_PATH"] = str(toolkit)
            made["PATH"] = _joined(
                str(root / "bin"), str(toolkit / "bin"), environment.get("PATH", os.defpath)
            )
    return made


def _joined(*parts: str) -> str:
    return ":".join(part for part in parts if part)


def cuda_wheels(root: Path) -> Path | None:
    """Return the directory in which the wheels of the newest CUDA of an environment lie; None for none."""
    found = [
        (int(match[1]), path)
        for path in root.glob("lib/python3.*/site-packages/nvidia/cu*")
        if (match := CUDA_DIRECTORY.fullmatch(path.name)) and (path / "lib").is_dir()
    ]
    return max(found)[1] if found else None


def _runtime_version(wheels: Path) -> tuple[int, int]:
    """Return the CUDA that the environment's runtime library is of."""
    for path in wheels.parent.parent.glob("nvidia_cuda_runtime-*.dist-info"):
        if found := CUDART.fullmatch(path.name):
            return int(found[1]), int(found[2])
    match = CUDA_DIRECTORY.fullmatch(wheels.name)
    assert match is not None, "as cuda_wheels found it"
    return int(match[1]), 0


def host_toolkit(environment: Mapping[str, str], *, at_least: tuple[int, int]) -> Path | None:
    """Return the host's first CUDA toolkit of that major version that is new enough; None for none."""
    for place in _toolkits(environment):
        version = _nvcc_version(place / "bin" / "nvcc")
        if version is not None and version[0] == at_least[0] and version >= at_least:
            return place
    return None


def _toolkits(environment: Mapping[str, str]) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    if nvcc := shutil.which("nvcc", path=environment.get("PATH", "")):
        yield Path(os.path.realpath(nvcc)).parent.parent
    yield Path(USUAL_TOOLKIT)


def _nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """Ask it; None for one that does not run, or whose toolkit has no library to link with."""
    if not os.access(nvcc, os.X_OK) or not (nvcc.parent.parent / "lib64" / "libcudart.so").exists():
        return None
    try:
        done = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=NVCC_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = RELEASE.search(done.stdout)
    return (int(found[1]), int(found[2])) if found else None


def link_toolkit(root: Path, wheels: Path) -> Path:
    """Give the wheels a toolkit's shape, once. Two runs that do it at a time make the same."""
    target = root / CUDA_HOME
    links = dict(toolkit_links(wheels))
    if all(
        (target / name).is_symlink() and os.readlink(target / name) == to
        for name, to in links.items()
    ):
        return target
    building = Path(tempfile.mkdtemp(prefix=f".{CUDA_HOME}.", dir=root))
    try:
        for name, to in links.items():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).symlink_to(to)
        building.chmod(0o755)
        _put(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _put(building: Path, target: Path) -> None:
    """Move a directory to its place; what another run put there meanwhile is as good."""
    try:
        building.rename(target)
    except OSError:  # something is there: an older layout, or another run's
        old = Path(tempfile.mkdtemp(prefix=f".{CUDA_HOME}.", dir=target.parent))
        try:
            target.rename(old / "old")
            building.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def toolkit_links(wheels: Path) -> Iterator[tuple[str, str]]:
    """List the links as (name, where to), in an order that does not depend on the directory's."""
    for name in ("bin", "include", "nvvm"):
        if (wheels / name).is_dir():
            yield name, str(wheels / name)
    yield "lib", "lib64"
    taken = set()
    for file in sorted((wheels / "lib").iterdir(), key=lambda path: path.name):
        taken.add(file.name)
        yield f"lib64/{file.name}", str(file)
    for name in sorted(taken):
        if (match := LIBRARY.fullmatch(name)) and match[1] not in taken:
            taken.add(match[1])
            yield f"lib64/{match[1]}", name
    for pattern in DRIVER_LIBRARIES:
        for driver in sorted(Path("/").glob(f"{pattern[1:]}/libcuda.so.1")):
            # what -lcuda links with; the wheels have no stub of it
            yield "lib64/stubs/libcuda.so", str(driver)
            return
