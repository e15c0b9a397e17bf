"""Every file of requirements/ installs: from the public index alone, and where a CPU build of torch is offered.

uv resolves each file both ways, from wheels alone. pip, which takes longer, resolves the two that scripts/ and CI
install: with this account's configuration, and without any. Nothing is installed, and no large wheel is downloaded.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rollouts.remote.plan import read_lock

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
FILES = sorted(path.name for path in REQUIREMENTS.glob("*.txt"))
PIP_FILES = ("constraints.txt", "sglang-cpu.txt")
PIP = "pip==26.3"  # an older one downloads all wheels in a dry run
RESOLVE_S = 600
UV = (str(Path(sys.executable).with_name("uv")), "--quiet", "--system-certs")
# What a CPU build of torch 2.13.0 requires: nothing of CUDA, and no triton.
CPU_TORCH = (
    "filelock",
    "typing-extensions>=4.10.0",
    "setuptools",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec",
)


def account() -> dict[str, str]:
    """This process's environment, in which pip has the account's configuration."""
    return dict(os.environ)


def plain(home: Path) -> dict[str, str]:
    """An environment in which pip and uv know the public index alone. Certificates and proxies are the machine's."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.cert"]
    configured = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    certificates = os.environ.get("PIP_CERT") or configured
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_", "XDG_"))
    }
    own = {"HOME": str(home), "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}
    return {
        **kept,
        **own,
        **({"PIP_CERT": certificates, "SSL_CERT_FILE": certificates} if certificates else {}),
    }


def resolve(arguments: list[str], environment: dict[str, str]) -> str:
    """Run uv; stdout. AssertionError with what it said when it does not resolve."""
    done = subprocess.run(
        [*UV, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RESOLVE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty HOME, once it was seen that the index answers. This file needs the network, and says so without it."""
    made = tmp_path_factory.mktemp("home")
    (made / "one.txt").write_text("iniconfig\n")
    try:
        resolve(["pip", "compile", str(made / "one.txt")], plain(made))
    except AssertionError as error:
        pytest.fail(
            f"the public package index cannot be reached from here, and these tests ask it:\n{error}"
        )
    return made


@pytest.fixture(scope="module")
def cpu_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that offers torch 2.13.0+cpu, as far as a resolver looks at it."""
    directory = tmp_path_factory.mktemp("wheels")
    info = "torch-2.13.0+cpu.dist-info"
    requires = "".join(f"Requires-Dist: {line}\n" for line in CPU_TORCH)
    tag = "cp311-cp311-manylinux_2_28_x86_64"
    with zipfile.ZipFile(directory / f"torch-2.13.0+cpu-{tag}.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n{requires}",
        )
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")
    return directory


def passes(name: str, directory: Path) -> Iterator[list[str]]:
    """The arguments of each pass of the bootstrap over a file: its lines, then those without dependencies."""
    requirements, no_deps = read_lock((REQUIREMENTS / name).read_text())
    for lines, options in ((requirements, []), (no_deps, ["--no-deps"])):
        file = directory / f"{name}{''.join(options)}.in"
        file.write_text("\n".join(lines) + "\n")
        if lines:
            yield [*options, str(file)]


def pins(name: str) -> set[str]:
    """name==version of each line of a file."""
    return {
        line.lower().replace("_", "-")
        for lines in read_lock((REQUIREMENTS / name).read_text())
        for line in lines
    }


@pytest.mark.parametrize("offered", [False, True], ids=["public index", "CPU wheel offered"])
@pytest.mark.parametrize("name", FILES)
def test_uv_resolves(name: str, offered: bool, home: Path, cpu_wheel: Path, tmp_path: Path) -> None:
    """Goal: each lock resolves to what it pins, from wheels, and torch is the CPU build where one is offered. Red with
    triton pinned to another version than the public index's torch wants, and with a pin that has no wheel there."""
    options = ["--no-header", "--no-annotate", "--python-version", "3.11", "--only-binary", ":all:"]
    options += ["--find-links", str(cpu_wheel)] if offered else []
    found: set[str] = set()
    for arguments in passes(name, tmp_path):
        output = resolve(["pip", "compile", *options, *arguments], plain(home))
        found |= {line.strip().lower() for line in output.splitlines() if "==" in line}
    torch = "torch==2.13.0+cpu" if offered else "torch==2.13.0"
    assert torch in found
    assert pins(name) - found <= {"torch==2.13.0"}


@pytest.fixture(scope="module")
def pip_answers(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[set[str]]]]:
    """What pip would install, by file and way, all worked out side by side: each takes half a minute of waiting."""
    directory = tmp_path_factory.mktemp("pip")
    with ThreadPoolExecutor(4) as pool:
        yield {
            (name, way): pool.submit(pip_resolves, name, environment, directory / way)
            for name in PIP_FILES
            for way, environment in (("account", account()), ("public", plain(home)))
        }


def pip_resolves(name: str, environment: dict[str, str], directory: Path) -> set[str]:
    """`pip install --dry-run` of a file; name==version of all that it would install."""
    directory.mkdir(exist_ok=True)
    found: set[str] = set()
    pip = [
        "tool",
        "run",
        "--python",
        sys.executable,
        "--from",
        PIP,
        "python",
        "-m",
        "pip",
        "install",
        "--dry-run",
    ]
    pip += [
        "--ignore-installed",
        "--use-feature=fast-deps",
        "--no-cache-dir",
        "--progress-bar",
        "off",
        "--quiet",
    ]
    for index, arguments in enumerate(passes(name, directory)):
        report = directory / f"{name}-{index}.json"
        options = [
            *arguments[:-1],
            "--only-binary",
            ":all:",
            "--report",
            str(report),
            "-r",
            arguments[-1],
        ]
        resolve([*pip, *options], environment)
        items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        found |= {f"{item['name'].lower().replace('_', '-')}=={item['version']}" for item in items}
    return found


@pytest.mark.timeout(2 * RESOLVE_S)
@pytest.mark.parametrize("way", ["account", "public"])
@pytest.mark.parametrize("name", PIP_FILES)
def test_pip_resolves(
    name: str, way: str, pip_answers: dict[tuple[str, str], Future[set[str]]]
) -> None:
    """Goal: what scripts/setup and the demo on SGLang install resolves with this account's pip configuration, and in an
    empty HOME with none. Red with triton==3.9.0 in sglang-cpu.txt: no solution from the public index alone."""
    found = pip_answers[name, way].result()
    assert {pin.partition("+")[0] for pin in found} >= pins(name)
    if way == "public":
        assert "torch==2.13.0" in found and "triton==3.7.1" in found


def test_trainer_and_engines_share_torch_on_cuda() -> None:
    """Goal: the trainer's CUDA pins and the engines' have one torch, one NCCL, and one triton. Red with
    torch==2.15.0 in trainer-cuda.txt."""
    shared = (
        "torch==",
        "triton==",
        "nvidia-nccl-cu13==",
        "nvidia-cuda-runtime==",
        "nvidia-cudnn-cu13==",
    )
    found = [
        sorted(pin for pin in pins(name) if pin.startswith(shared))
        for name in ("trainer-cuda.txt", "sglang-cuda.txt", "vllm-cuda.txt")
    ]
    assert len(found[0]) == len(shared) and found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["sglang-cuda.txt", "vllm-cuda.txt"])
def test_a_locks_compiler_is_its_runtimes(name: str) -> None:
    """Goal: nvcc, its parts and the headers are of one CUDA minor version, and what compiles is there. Red with nvcc
    13.5 beside a runtime of 13.0: "CUDA compiler and CUDA toolkit headers are incompatible"."""
    parts = (
        "nvidia-cuda-runtime",
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
        "nvidia-cuda-cccl",
    )
    versions = dict(pin.split("==") for pin in pins(name))
    assert {".".join(versions[part].split(".")[:2]) for part in parts} == {"13.0"}
    assert "ninja" in versions
