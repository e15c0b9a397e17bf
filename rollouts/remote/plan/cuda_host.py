"""What a host needs for CUDA beside its cards: driver, C library, compilers, headers, /dev/shm. Pure.

gpu_problems.py asks these rules for a config, and for a host alone.
"""

import re
from collections.abc import Iterator

from rollouts.config import Config, EngineConfig
from rollouts.config.checks.engine import grows_segments
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.torch_build import (
    AUTO_BUILDS,
    DRIVER_MIN,
    base_python,
    lock_cuda,
    trainer_build,
    version_numbers,
)
from rollouts.remote.repository import Code

GLIBC_MIN = {"sglang": (2, 34), "": (2, 28)}  # of the wheels of SGLang's lock, and of torch
SHM_DOCKER_MIB = 64  # what a container gets without --shm-size
COMPILING_ENGINES = ("sglang", "vllm")  # compile kernels when they first start on CUDA
MIB = 2**20
# Cards for which NVIDIA has cuda-compat, a newer CUDA's user-mode driver beside an older kernel driver
DATA_CENTRE = re.compile(r"^(NVIDIA |Tesla )?(Tesla\b|[ABHLTV]\d+S?\b|GH\d+|GB[23]\d\d)")


def engine_of(config: Config) -> EngineConfig | None:
    """Return the engine that the run starts; None if it starts none."""
    return config.engine if config.uses_engine else None


def driver_problems(config: Config, facts: HostFacts, code: Code, target: str) -> Iterator[Problem]:
    """Compare the driver with the CUDA of each environment."""
    have = version_numbers(facts.driver or "")
    if not have or has_compat(config, facts):
        return
    build = trainer_build(config, facts)
    needed, why = DRIVER_MIN.get(build.build), f"torch for {build.build}: {build.reason}"
    if build.build == "index" and config.host.torch_build == "auto":
        needed, why = (
            DRIVER_MIN[AUTO_BUILDS[-1]],
            f"torch for {AUTO_BUILDS[-1]}, the oldest build there is",
        )
    if needed is not None and have < needed:
        older = config.host.torch_build != "auto" and have >= DRIVER_MIN["cu126"]
        fix = "set host.torch_build='auto'" if older else ""
        yield old_driver(facts, target, "the trainer's environment", needed, why, fix=fix)
    engine = engine_of(config)
    cuda = lock_cuda((code.engine_requirements or "").splitlines()) if engine else ""
    needed = {"cu12": DRIVER_MIN["cu126"], "cu13": DRIVER_MIN["cu130"]}.get(cuda)
    if engine and needed is not None and have < needed:
        why = f"{engine.requirements_file} pins torch for CUDA {cuda[2:]}"
        fix = "take engine=Embedded(...) with requirements_file=None, which runs in the trainer's environment"
        can = have >= DRIVER_MIN["cu126"]
        yield old_driver(
            facts, target, "the engine's environment", needed, why, fix=fix if can else ""
        )


def old_driver(
    facts: HostFacts, target: str, what: str, needed: tuple[int, ...], why: str, *, fix: str
) -> Problem:
    """Name the driver, the environment that it cannot run, and each way out."""
    least = ".".join(map(str, needed))
    if facts.gpus and all(DATA_CENTRE.match(gpu.name) for gpu in facts.gpus):
        compat = (
            "; on these data-centre cards NVIDIA's cuda-compat-13-0 does too, with"
            " host.env={'LD_LIBRARY_PATH': '/usr/local/cuda-13.0/compat'}"
        )
    else:
        compat = " (NVIDIA's cuda-compat is for data-centre cards alone)"
    return Problem(
        f"{target}: NVIDIA driver {facts.driver} is too old for {what}.",
        found=f"driver {facts.driver}, {', '.join(dict.fromkeys(gpu.name for gpu in facts.gpus))}",
        needed=f"driver {least} or newer: {why}",
        fix=f"update the driver there{compat if needed == DRIVER_MIN['cu130'] else ''}{f'; or {fix}' if fix else ''}",
    )


def has_compat(config: Config, facts: HostFacts) -> bool:
    """Return whether the config says that cuda-compat replaces a newer driver."""
    named = "compat" in config.host.env.get("LD_LIBRARY_PATH", "")
    return named and all(DATA_CENTRE.match(gpu.name) for gpu in facts.gpus)


def toolchain_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    """List what is compiled with, and linked against, on the host."""
    engine = engine_of(config)
    kind = engine.kind if engine else ""
    yield from libc_problems(facts, target, kind)
    compiling = kind in COMPILING_ENGINES
    users = [f"engine={type(engine).__name__}"] if compiling else []
    users += ["model.compile=True"] if config.model.compile else []
    if not users:
        return
    yield from compiler_problems(facts, target, " and ".join(users))
    if facts.python is None or facts.python_headers is None:
        return
    asked = {base_python(config, facts, engine=True): users[0]} if compiling else {}
    if config.model.compile:
        asked.setdefault(base_python(config, facts, engine=False), users[-1])
    for python, user in asked.items():
        # one that is yet to be installed has them
        if python.path and python.path not in facts.python_headers:
            yield no_headers(target, python.path, python.version, user)


def libc_problems(facts: HostFacts, target: str, kind: str) -> Iterator[Problem]:
    """Compare the host's C library with the wheels of an engine, or of torch."""
    libc = facts.cuda.libc
    found = re.search(r"(?:glibc|GLIBC|GNU libc)\D*(\d+\.\d+)", libc)
    least = GLIBC_MIN.get(kind, GLIBC_MIN[""])
    what = "the wheels of SGLang's lock" if kind == "sglang" else "torch's wheels"
    if (found and version_numbers(found[1]) < least) or "musl" in libc:
        yield Problem(
            f"{target}: {libc} is too old for {what}." if found else f"{target} has no glibc.",
            found=libc,
            needed=f"glibc {'.'.join(map(str, least))} or newer: Ubuntu 22.04, Debian 12, RHEL 9 have it",
            fix="run in a container of a newer distribution, or choose another --remote"
            + ("; engine=Embedded(...) needs glibc 2.28" if kind == "sglang" and found else ""),
        )


def compiler_problems(facts: HostFacts, target: str, users: str) -> Iterator[Problem]:
    """Say that `users` find no compiler."""
    have = facts.cuda.compilers
    if have is None or {"c++", "gcc"} <= {*have} or {"c++", "cc"} <= {*have}:
        return
    yield Problem(
        f"{target} has no C++ compiler." if "c++" not in have else f"{target} has no C compiler.",
        found=f"of c++, g++, gcc and cc: {', '.join(have) or 'none'}",
        needed=f"c++ and gcc: {users} compile kernels there (nvcc and ninja come with the engine's environment)",
        fix="on the host: apt-get install g++",
    )


def no_headers(target: str, python: str, version: str, users: str) -> Problem:
    """Say that a Python, which `users` run in, lacks Python.h."""
    minor = ".".join(version.split(".")[:2])
    return Problem(
        f"{target}: Python {version} has no headers.",
        found=f"no Python.h beside {python}",
        needed=f"Python.h: {users} compile a module with it when they first run",
        fix=f"on the host: apt-get install python{minor}-dev",
    )


def weights_shm_problems(
    config: Config, facts: HostFacts, code: Code, target: str
) -> Iterator[Problem]:
    """Compare /dev/shm with two copies of the weights, by the model's files or its name."""
    engine, free = engine_of(config), facts.cuda.shm_free_mib
    if (
        engine is None
        or not engine.weight_sync.on_tmpfs
        or engine.weight_sync.kind != "disk"
        or free is None
    ):
        return
    count, guessed = code.inputs.parameters, False
    if count is None and (
        named := re.search(r"(\d+(?:\.\d+)?)B\b", config.model.name, re.IGNORECASE)
    ):
        count, guessed = int(float(named[1]) * 1e9), True
    width = 2 if config.model.dtype == "bfloat16" else 4
    needed = 2 * width * count // MIB if count is not None else SHM_DOCKER_MIB + 1
    if free >= needed:
        return
    how = "by the model's name" if guessed else "by the model's files"
    size = f"{needed} MiB, {how}" if count is not None else "their size is not known here"
    wanted = f"engine.weight_sync.on_tmpfs=True: two copies of the weights, {size}"
    yield small_shm(
        facts, target, wanted, f"{-(-needed * 5 // 4 // 1024)}g" if count is not None else "8g"
    )


def small_shm(facts: HostFacts, target: str, needed: str, size: str) -> Problem:
    """Say that /dev/shm lacks room, and how a container gets `size` of it."""
    return Problem(
        f"{target}: /dev/shm is too small for the weights.",
        found=f"{facts.cuda.shm_free_mib} of {facts.cuda.shm_total_mib} MiB free"
        + (": Docker's default" if facts.cuda.shm_total_mib == SHM_DOCKER_MIB else ""),
        needed=needed,
        fix=f"start the container with --shm-size={size} (or --ipc=host), or set engine.weight_sync.on_tmpfs=False",
    )


def allocator_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    """Refuse growing segments that the host's own variables ask for; the config's checks refuse the config's."""
    engine = engine_of(config)
    if engine is None or engine.weight_sync.kind != "tensor":
        return
    for name, value in facts.cuda.allocator:
        if grows_segments(value) and name not in config.host.env:
            yield Problem(
                f"{target} sets {name}={value!r} by itself, and engine.weight_sync is a TensorSync.",
                found=f"{name}={value!r} in a command's environment there: start-up files, or a container's image",
                needed="memory that another process can open: segments that grow have no handles",
                fix=f"set host.env={{{name!r}: 'expandable_segments:False'}}, or engine.weight_sync=DiskSync(...)",
            )


def dtype_problems(config: Config) -> Iterator[Problem]:
    """Refuse float32 if the engine's kernels have half precision alone."""
    engine = engine_of(config)
    if engine is not None and engine.kind in COMPILING_ENGINES and config.model.dtype == "float32":
        yield Problem(
            f"model.dtype='float32' with engine={type(engine).__name__} on CUDA.",
            needed="half precision: its attention kernels (FlashAttention, FlashInfer) take nothing else",
            fix="set model.dtype='bfloat16', or take engine=Embedded(...)",
        )
