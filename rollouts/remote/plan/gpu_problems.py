"""Every reason why a run on NVIDIA GPUs would fail on its host. Pure: config + facts + code → problems, and so on.

cuda_host.py has those of the host beside its cards. Rules for one card and for a host take no config, so that
`deploy --remote HOST` shows them too. Whether a config fits into a card's memory: memory/.
"""

from collections.abc import Iterator, Sequence

from rollouts.config import Config
from rollouts.machine.nvidia_smi import Gpu, describe_gpu, holders, is_broken, is_free
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.cuda_host import (
    SHM_DOCKER_MIB,
    allocator_problems,
    compiler_problems,
    driver_problems,
    dtype_problems,
    engine_of,
    has_compat,
    libc_problems,
    no_headers,
    old_driver,
    small_shm,
    toolchain_problems,
    weights_shm_problems,
)
from rollouts.remote.plan.torch_build import DRIVER_MIN, version_numbers
from rollouts.remote.repository import Code

SHM_NCCL_MIB = 512  # NCCL's own segments between ranks take less
UNREACHED = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that name no card


def gpu_problems(
    config: Config, facts: HostFacts, code: Code, target: str, *, busy_ok: bool = False
) -> Iterator[Problem]:
    """List what is known to fail: missing cards, cards that cannot be used, and what the host lacks for CUDA."""
    yield from weights_shm_problems(config, facts, code, target)
    if config.target.device_type != "cuda":
        return
    yield from _missing_problems(config, facts, target)
    if not facts.gpus:
        return
    for gpu in named_gpus(config, facts):
        state = [*card_problems(gpu, target)]
        yield from state
        yield from _sharing_problems(config, facts, gpu, target)
        if not state and not busy_ok and (problem := _busy_problem(config, facts, gpu, target)):
            yield problem
    yield from _visible_problems(config, facts, target)
    yield from driver_problems(config, facts, code, target)
    yield from toolchain_problems(config, facts, target)
    yield from dtype_problems(config)
    yield from allocator_problems(config, facts, target)


def gpu_warnings(config: Config, facts: HostFacts, *, busy_ok: bool = False) -> Iterator[str]:
    """Say what may work, and usually is not meant."""
    if config.target.device_type != "cuda":
        return
    for gpu in named_gpus(config, facts) if busy_ok else ():
        if not is_free(gpu, facts.gpu_processes):
            yield f"GPU {gpu.index} is busy, and --busy-ok takes it: {describe_gpu(gpu)}"
    if "CUDA_VISIBLE_DEVICES" in config.host.env:
        yield "host.env sets CUDA_VISIBLE_DEVICES: it replaces target.gpu_ranks and engine.gpu_ranks in every process"
    if (
        config.host.torch_build == "index"
        and () < version_numbers(facts.driver or "") < DRIVER_MIN["cu130"]
    ):
        yield (
            f"host.torch_build='index' and NVIDIA driver {facts.driver}: the public index's torch is for CUDA 13, which"
            " needs driver 580; 'auto' takes an older build"
        )
    engine = engine_of(config)
    ranks = max(len(config.target.gpu_ranks), engine.tensor_parallel_size if engine else 1)
    total = facts.cuda.shm_total_mib
    if ranks > 1 and total is not None and total < SHM_NCCL_MIB:
        yield (
            f"/dev/shm has {total} MiB, and NCCL keeps what {ranks} ranks exchange there where cards do not reach each"
            " other: start the container with --shm-size=1g or --ipc=host"
        )


def gpu_notes(config: Config, facts: HostFacts) -> Iterator[str]:
    """Say what is taken for granted."""
    if config.target.device_type != "cuda":
        return
    for gpu in named_gpus(config, facts):
        if gpu.unreadable and not is_broken(gpu):
            yield f"GPU {gpu.index} ({gpu.name}) reports no memory ({gpu.unreadable}): whether it is free is not known"
        if _exclusive(gpu) and facts.cuda.mps:
            yield f"GPU {gpu.index} is in {gpu.compute_mode} mode, and an MPS server shares it"
    if facts.gpus and facts.gpu_problem:
        yield f"nvidia-smi also said: {facts.gpu_problem}"
    if facts.driver and has_compat(config, facts):
        yield "host.env names cuda-compat: the driver is not compared with the CUDA of the environments"


def host_stops(facts: HostFacts, target: str) -> Iterator[Problem]:
    """List why the host's cards, or some of them, can be used by nothing."""
    if facts.gpu_problem:
        yield Problem(
            f"{target}: nvidia-smi fails.",
            found=facts.gpu_problem,
            fix=_driver_fix(facts.gpu_problem),
        )
    for gpu in facts.gpus:
        yield from card_problems(gpu, target)


def host_advice(facts: HostFacts, target: str) -> Iterator[Problem]:
    """List what the shipped GPU configs would meet on a host that has NVIDIA's tools; each with its fix."""
    if not facts.gpus and not facts.gpu_problem:
        return
    yield from host_stops(facts, target)
    for gpu in facts.gpus:
        if _exclusive(gpu) and not facts.cuda.mps:
            yield _exclusive_problem(gpu, target, "a config that trains and samples on this card")
    if facts.driver:
        needed = DRIVER_MIN["cu130"]
        if version_numbers(facts.driver) < needed:
            yield old_driver(
                facts,
                target,
                "an environment for CUDA 13",
                needed,
                "SGLang's and vLLM's locks",
                fix="",
            )
    yield from libc_problems(facts, target, "sglang")
    yield from compiler_problems(facts, target, "SGLang, vLLM and model.compile=True")
    if (
        facts.python
        and facts.python_headers is not None
        and facts.python not in facts.python_headers
    ):
        yield no_headers(
            target, facts.python, facts.python_version, "SGLang, vLLM and model.compile=True"
        )
    total = facts.cuda.shm_total_mib
    if total is not None and total <= SHM_DOCKER_MIB:
        yield small_shm(
            facts, target, "engine.weight_sync.on_tmpfs=True: two copies of the model", "8g"
        )
    if facts.cuda.visible_devices is not None:
        yield Problem(
            f"{target} sets CUDA_VISIBLE_DEVICES by itself.",
            found=f"CUDA_VISIBLE_DEVICES={facts.cuda.visible_devices!r} in a command's environment there",
            needed="target.gpu_ranks and engine.gpu_ranks among these",
            fix="name those cards, by nvidia-smi's index, or unset it in the host's start-up files",
        )


# --- cards ----------------------------------------------------------------------------------------------------------


def card_problems(gpu: Gpu, target: str) -> Iterator[Problem]:
    """List why nothing can run on a card."""
    if is_broken(gpu):
        yield Problem(
            f"{target}: GPU {gpu.index} cannot be read.",
            found=f"{describe_gpu(gpu)} (nvidia-smi)",
            needed="a card that reports its memory: this one may have fallen off the bus",
            fix="look for `NVRM: Xid` in `dmesg` there, and reboot the host; or name another card",
        )
    if gpu.mig == "Enabled":
        yield Problem(
            f"{target}: GPU {gpu.index} is split by MIG.",
            found=describe_gpu(gpu),
            needed="a whole card: by the card's number CUDA takes the first slice, whatever its size",
            fix=f"on the host, as root: nvidia-smi -i {gpu.index} -mig 0; or name another card",
        )
    if gpu.compute_mode == "Prohibited":
        yield Problem(
            f"{target}: GPU {gpu.index} is closed to compute processes.",
            found=describe_gpu(gpu),
            needed="compute mode Default",
            fix=f"on the host, as root: nvidia-smi -i {gpu.index} -c DEFAULT; or name another card",
        )


def _exclusive(gpu: Gpu) -> bool:
    return gpu.compute_mode.startswith("Exclusive")


def _exclusive_problem(gpu: Gpu, target: str, needed: str) -> Problem:
    return Problem(
        f"{target}: GPU {gpu.index} takes one process at a time.",
        found=describe_gpu(gpu),
        needed=needed,
        fix=f"on the host, as root: nvidia-smi -i {gpu.index} -c DEFAULT; or give each its own card",
    )


def _sharing_problems(config: Config, facts: HostFacts, gpu: Gpu, target: str) -> Iterator[Problem]:
    engine = engine_of(config)
    if engine is None or not _exclusive(gpu) or facts.cuda.mps:
        return
    if gpu.index in config.target.gpu_ranks and gpu.index in engine.gpu_ranks:
        yield _exclusive_problem(gpu, target, f"trainer and engine on one card: {_wanted(config)}")


def _missing_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    ranks, there = _device_ranks(config), {gpu.index for gpu in facts.gpus}
    missing = [rank for rank in ranks if rank not in there]
    if not missing:
        return
    count = len(facts.gpus)
    listed = "\n".join(filter(None, (*map(describe_gpu, facts.gpus), facts.gpu_problem)))
    some = any(rank in there for rank in ranks)
    yield Problem(
        f"{target} has {count} GPU{'' if count == 1 else 's'}; this config needs {len(ranks)}"
        f"{f', {missing} are not there' if some else ''}.",
        found=listed or "no nvidia-smi, or it lists no device",
        needed=_wanted(config),
        fix=_missing_fix(config, facts),
    )


def _missing_fix(config: Config, facts: HostFacts) -> str:
    if not facts.gpus:
        return f"{_driver_fix(facts.gpu_problem)}, choose another --remote, or set target.device_type='cpu'".lstrip(
            ", "
        )
    first = facts.gpus[0].index
    if engine_of(config) and len(config.target.gpu_ranks) == 1:
        return f"set engine.gpu_ranks=[{first}] and target.gpu_ranks=[{first}] (colocated), or choose another --remote"
    return "name fewer devices in target.gpu_ranks, or choose another --remote"


def _driver_fix(said: str) -> str:
    """Return what to do about a text of nvidia-smi's; "" for none."""
    rules = (
        (
            "version mismatch",
            "reboot the host: its driver was updated and the old one is still loaded",
        ),
        (
            "communicate with the NVIDIA driver",
            "load the driver there (`modprobe nvidia`), or install it for this kernel",
        ),
        ("did not answer", "look for `NVRM: Xid` in `dmesg` there, and reboot the host"),
        ("GPU is lost", "reboot the host"),
        ("Unknown Error", "in a container: start it again with its GPUs (`docker run --gpus all`)"),
    )
    return next(
        (fix for words, fix in rules if words in said), "run nvidia-smi there" if said else ""
    )


def _busy_problem(config: Config, facts: HostFacts, gpu: Gpu, target: str) -> Problem | None:
    if is_free(gpu, facts.gpu_processes):
        return None
    who = [
        f"pid {p.pid} {p.name}"
        + (f", {p.memory_mib} MiB" if p.memory_mib is not None else "")
        + (f", of {p.owner} for {p.running_for}" if p.owner else "")
        for p in holders(gpu, facts.gpu_processes)
        if p.name != "[Not Found]"
    ]
    unseen = (
        ""
        if who
        else "who uses it is not seen from here: a display, or processes outside this container"
    )
    free = [
        other.index
        for other in facts.gpus
        if is_free(other, facts.gpu_processes) and not [*card_problems(other, target)]
    ]
    fix = (
        f"free are {free}: name those, or end what runs there"
        if free
        else "end what runs there, or wait"
    )
    return Problem(
        f"{target}: GPU {gpu.index} is busy.",
        found="\n".join(filter(None, (describe_gpu(gpu), *who, unseen))),
        needed=_wanted(config),
        fix=f"{fix}; --wait queues on the host until it is free; --busy-ok starts beside it",
    )


def is_given(gpu: Gpu, facts: HostFacts) -> bool:
    """Return whether the host's scheduler or start-up files, if they choose cards, give this one."""
    value = facts.cuda.visible_devices
    if value is None:
        return True
    entries = [] if value.strip() in UNREACHED else [entry.strip() for entry in value.split(",")]
    return any(
        entry == str(gpu.index) or (entry[:4] == "GPU-" and gpu.uuid.startswith(entry))
        for entry in entries
    )


def _visible_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    """Compare the cards that the host's scheduler or start-up files give with those that the config names."""
    value = facts.cuda.visible_devices
    outside = [gpu.index for gpu in named_gpus(config, facts) if not is_given(gpu, facts)]
    if outside:
        yield Problem(
            f"{target} gives this user other GPUs than {outside}.",
            found=f"CUDA_VISIBLE_DEVICES={value!r} is set there, by a scheduler or the shell's start-up files",
            needed=_wanted(config),
            fix="name those cards, by nvidia-smi's index, or unset it there if you may use all cards",
        )


# --- what the config names ------------------------------------------------------------------------------------------


def _device_ranks(config: Config) -> Sequence[int]:
    engine = engine_of(config)
    return sorted({*config.target.gpu_ranks, *(engine.gpu_ranks if engine else ())})


def named_gpus(config: Config, facts: HostFacts) -> list[Gpu]:
    """Return the cards that the config names, of those that are there."""
    ranks = _device_ranks(config)
    return sorted((gpu for gpu in facts.gpus if gpu.index in ranks), key=lambda gpu: gpu.index)


def _wanted(config: Config) -> str:
    engine = engine_of(config)
    wanted = [f"target.gpu_ranks={config.target.gpu_ranks}"]
    return ", ".join(wanted + ([f"engine.gpu_ranks={engine.gpu_ranks}"] if engine else []))
