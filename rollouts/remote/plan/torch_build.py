"""Which build of torch each environment gets, and which Python makes it. Pure: config + facts + code → decisions.

A plain package index gives a CUDA build, of the newest CUDA: gigabytes that a CPU host has no use for, and that an
older driver cannot run. `host.torch_build` names the build, or leaves it to the host's device and driver.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rollouts.config import Config
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.repository import Code

# The least NVIDIA driver of each CUDA: a minor version runs on its major version's driver.
DRIVER_MIN = {"cu126": (525, 60), "cu128": (525, 60), "cu130": (580,)}
AUTO_BUILDS = ("cu130", "cu126")  # the builds that every torch since 2.10 has, newest first
CU128_LAST = "2.11"  # the last torch that was built for CUDA 12.8
TORCH_MIN_CUDA = (2, 12)  # torch.nn.attention.varlen takes the scale and the window since then
# CUDA 12.6 has no code for these (compute capability 10 and 12).
BLACKWELL = re.compile(r"\bB[123]00\b|\bGB\d+|RTX 50\d\d|RTX PRO|\bThor\b")
TRAINER_PYTHON_MIN = (3, 11)  # requires-python of pyproject.toml
# The Pythons for which the locks' packages have wheels: outlines-core has none for newer ones.
ENGINE_PYTHONS = {"sglang": ((3, 11), (3, 12)), "vllm": ((3, 11), (3, 12))}
MADE_PYTHON = (
    "3.11"  # installed if the host has none that fits: the locks were resolved for this one
)
SHARED_BY = ("broadcast", "tensor")  # kinds of engine.weight_sync that need one torch on both sides


@dataclass(frozen=True)
class TorchBuild:
    """One environment's build of torch."""

    build: str  # "cpu", "cu126", "cu128", "cu130", or "index": what the installer's own configuration gives
    falls_back: bool  # take the configured index where the build's own cannot be reached
    reason: str


@dataclass(frozen=True)
class BasePython:
    """What makes an environment: the host's own interpreter, or one that is installed into the rollouts home."""

    path: str  # absolute; "" for one that is yet to be installed
    version: str  # "3.11.2"; "3.11" for one that is yet to be installed


def trainer_build(config: Config, facts: HostFacts) -> TorchBuild:
    """Decide the trainer's build."""
    wanted = config.host.torch_build
    if wanted != "auto":
        return TorchBuild(wanted, False, f"host.torch_build={wanted!r}")
    if config.target.device_type == "mps":
        return TorchBuild("index", False, "device_type='mps': the index has one build")
    if config.target.device_type == "cpu":
        return TorchBuild("cpu", True, "device_type='cpu'")
    driver = version_numbers(facts.driver or "")
    if not driver:
        return TorchBuild("index", False, "the host's NVIDIA driver is not known")
    for build in AUTO_BUILDS:
        if driver >= DRIVER_MIN[build]:
            # Without its own index an older build is not to be had: the configured one gives the newest CUDA
            return TorchBuild(build, build == AUTO_BUILDS[0], f"NVIDIA driver {facts.driver}")
    return TorchBuild(
        "index", False, f"NVIDIA driver {facts.driver} runs none of {', '.join(AUTO_BUILDS)}"
    )


def engine_build(config: Config, facts: HostFacts) -> TorchBuild:
    """Decide the build of an engine that has a lock: on CUDA the lock pins torch's own packages too."""
    if config.target.device_type == "cuda":
        return TorchBuild("index", False, "the lock pins torch with its CUDA")
    return trainer_build(config, facts)


def build_words(build: TorchBuild) -> str:
    """Say it for `--plan`."""
    if build.build == "index":
        return f"torch as the package index gives it ({build.reason})"
    fallback = (
        "; the configured index where PyTorch's own cannot be reached" if build.falls_back else ""
    )
    return f"torch build {build.build} ({build.reason}){fallback}"


def base_python(config: Config, facts: HostFacts, *, engine: bool) -> BasePython:
    """Choose the interpreter that makes an environment: the host's own if it fits, another there, else a new one."""
    assert facts.python is not None
    found = (
        [(facts.python, facts.python_version)]
        if facts.has_venv or config.host.installer == "uv"
        else []
    )
    found += [(path, version) for path, version in facts.pythons if (path, version) not in found]
    for path, version in found:
        if _fits(config, version, engine=engine):
            return BasePython(path, version)
    return BasePython("", MADE_PYTHON)


def _fits(config: Config, version: str, *, engine: bool) -> bool:
    numbers = version_numbers(version)[:2]
    kind = config.engine.kind if config.engine else ""
    if engine and kind in ENGINE_PYTHONS:
        return numbers in ENGINE_PYTHONS[kind]
    return numbers >= TRAINER_PYTHON_MIN


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: "570.86.15" → (570, 86, 15); () for none."""
    found = re.match(r"\d+(?:\.\d+)*", text.strip())
    return tuple(int(part) for part in found[0].split(".")) if found else ()


# --- problems -------------------------------------------------------------------------------------------------------


def torch_problems(config: Config, facts: HostFacts, code: Code, target: str) -> Iterator[Problem]:
    """List what is known to fail later: a build that the device cannot run, and torches that differ."""
    if config.target.device_type != "cuda":
        return
    build = trainer_build(config, facts)
    yield from _build_problems(config, facts, build, target)
    pinned = pinned_torch([*(code.constraints or "").splitlines(), *code.requirements])
    if pinned and version_numbers(pinned)[:2] < TORCH_MIN_CUDA:
        yield Problem(
            f"torch {pinned} is too old for training on CUDA.",
            found=f"torch=={pinned} in host.constraints_file={config.host.constraints_file!r} or the requirements",
            needed=f"{'.'.join(map(str, TORCH_MIN_CUDA))} or newer: its kernel for packed documents",
            fix="name host.constraints_file='rollouts:requirements/trainer-cuda.txt'",
        )
    yield from _shared_torch_problems(config, code, build, pinned)


def _build_problems(
    config: Config, facts: HostFacts, build: TorchBuild, target: str
) -> Iterator[Problem]:
    if build.build == "cpu":
        yield Problem(
            "host.torch_build='cpu' is a build without CUDA.",
            needed="target.device_type='cuda' trains on NVIDIA GPUs",
            fix="set host.torch_build='auto'",
        )
    devices = [
        gpu.name
        for gpu in facts.gpus
        if gpu.index in config.target.gpu_ranks and BLACKWELL.search(gpu.name)
    ]
    if build.build == "cu126" and devices:
        yield Problem(
            f"{target}: the torch build cu126 has no code for {devices[0]}.",
            found=build.reason,
            needed="a build for CUDA 13, and with it driver 580 or newer",
            fix="update the NVIDIA driver there, or choose another --remote",
        )


def _shared_torch_problems(
    config: Config, code: Code, build: TorchBuild, pinned: str
) -> Iterator[Problem]:
    engine = config.engine
    if (
        engine is None
        or not config.uses_engine
        or engine.weight_sync.kind not in SHARED_BY
        or not code.engine_requirements
    ):
        return
    lines = code.engine_requirements.splitlines()
    theirs, cuda = pinned_torch(lines), lock_cuda(lines)
    if theirs and _release(theirs) != _release(pinned):
        yield Problem(
            f"trainer and engine would have different versions of torch, and weight_sync={engine.weight_sync.kind!r}.",
            found=f"trainer: {pinned or 'whatever is newest, host.constraints_file pins none'};"
            f" engine: {theirs}, by {engine.requirements_file}",
            needed="the same torch: they share a communicator or memory",
            fix="name host.constraints_file='rollouts:requirements/trainer-cuda.txt', or set weight_sync=DiskSync(...)",
        )
    elif cuda and build.build.startswith("cu") and build.build[:4] != cuda:
        yield Problem(
            f"trainer and engine would have different CUDAs, and weight_sync={engine.weight_sync.kind!r}.",
            found=f"trainer: {build.build} ({build.reason}); engine: {cuda}, by {engine.requirements_file}",
            needed="the same CUDA and NCCL: they share a communicator or memory",
            fix="update the NVIDIA driver there, or set weight_sync=DiskSync(...) with an engine that the driver runs",
        )


def torch_warnings(config: Config) -> Iterator[str]:
    """Say what a build is usually not meant for."""
    if config.host.torch_build == "cu128":
        yield f"host.torch_build='cu128': torch {CU128_LAST} is the last that was built for it, as far as is known"


def pinned_torch(lines: Iterable[str]) -> str:
    """Return the version of a `torch==` line without its build; "" for none."""
    for line in lines:
        if found := re.match(r"\s*torch\s*===?\s*([^\s;,#+]+)", line, re.IGNORECASE):
            return found[1]
    return ""


def lock_cuda(lines: Iterable[str]) -> str:
    """Return the CUDA of a lock as "cu12", by the NCCL that it pins; "" where it pins none."""
    for line in lines:
        if found := re.match(r"\s*nvidia[-_]nccl[-_](cu\d+)", line, re.IGNORECASE):
            return found[1].lower()
    return ""


def _release(version: str) -> tuple[int, ...]:
    """Return a version without trailing zeros: 2.13 and 2.13.0 are one release."""
    numbers = list(version_numbers(version))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
