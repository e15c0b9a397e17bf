"""A machine's GPUs, as nvidia-smi lists them; both sides read its lines here. Standard library only.

nvidia-smi writes a word in brackets where it has no figure: [N/A] and [Not Supported] where a card tells none (a GB10
shares the host's memory), [Insufficient Permissions] in some containers, [Unknown Error] or [GPU is lost] for a card
that is broken.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FIELDS = ("index", "uuid", "name", "memory.total", "memory.free")  # every nvidia-smi has these
# An nvidia-smi refuses a query over one field that it does not know: compute_cap came with driver 495, MIG with 450
NEWER_FIELDS = ("driver_version", "compute_mode", "mig.mode.current", "compute_cap")
PROCESS_FIELDS = ("gpu_uuid", "pid", "used_memory", "process_name")
USAGE_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total")
NVIDIA_SMI_TIMEOUT_S = 20  # it hangs where the driver waits for a broken card
GPU_FREE_SHARE_MIN = 0.9  # a device with less free memory is in use


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card, as nvidia-smi lists it. The last four are "" where it does not tell."""

    index: int  # nvidia-smi's: the order of the PCI bus
    uuid: str
    name: str
    memory_total_mib: int  # 0: not told
    memory_free_mib: int
    compute_capability: str = ""  # "9.0"
    compute_mode: str = ""  # "Default", "Exclusive_Process", "Prohibited"
    mig: str = ""  # "Enabled", "Disabled"
    unreadable: str = ""  # what is printed in place of its memory: "[N/A]", "[Unknown Error]"


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """A compute process on a card. In a container it may have no process id or name that means anything there."""

    gpu_uuid: str
    pid: int
    memory_mib: int | None
    name: str
    owner: str = ""  # of the process, where it is seen
    running_for: str = ""  # "02:13:04", "3-02:13:04" with days


@dataclass(frozen=True, kw_only=True)
class GpuUsage:
    """How busy one card is. None: nvidia-smi does not tell, as of a card in MIG mode."""

    index: int
    use: float | None  # 0 to 1: in which share of the last moments it computed anything
    memory_mib: int | None
    memory_total_mib: int | None


def read_usage(lines: Iterable[str]) -> tuple[GpuUsage, ...]:
    """Return the cards of a query of USAGE_FIELDS, in csv without header and units; other lines are left out."""
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(USAGE_FIELDS) and cells[0].isdigit():
            use, used, total = map(_number, cells[1:])
            found.append(
                GpuUsage(
                    index=int(cells[0]),
                    use=None if use is None else min(1.0, use / 100),
                    memory_mib=used,
                    memory_total_mib=total,
                )
            )
    return tuple(found)


def read_gpus(lines: Sequence[str], fields: str) -> tuple[tuple[Gpu, ...], str]:
    """Return the cards, and what nvidia-smi said instead of listing one. `fields`: the query's, with commas."""
    names = fields.split(",") if fields else list(FIELDS)
    gpus, problem = [], ""
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(names) and cells[0].isdigit():
            gpus.append(_gpu(dict(zip(names, cells, strict=True))))
        elif line.strip():
            problem = line
    return tuple(gpus), problem


def read_driver(lines: Sequence[str], fields: str) -> str | None:
    """Return the driver's version, from the first card that tells it."""
    names = fields.split(",")
    position = names.index("driver_version") if "driver_version" in names else None
    for line in lines if position is not None else ():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(names) and re.match(r"\d", cells[position or 0]):
            return cells[position or 0]
    return None


def _gpu(cells: Mapping[str, str]) -> Gpu:
    total, free = _number(cells["memory.total"]), _number(cells["memory.free"])
    untold = next(
        (cells[name] for name in ("memory.total", "memory.free") if _number(cells[name]) is None),
        "",
    )
    return Gpu(
        index=int(cells["index"]),
        uuid=cells["uuid"],
        name=cells["name"],
        memory_total_mib=total or 0,
        memory_free_mib=(total or 0) if free is None else free,
        compute_capability=_word(cells, "compute_cap"),
        compute_mode=_word(cells, "compute_mode"),
        mig=_word(cells, "mig.mode.current"),
        unreadable=untold,
    )


def read_processes(lines: Iterable[str], owners: Iterable[str] = ()) -> tuple[GpuProcess, ...]:
    """Return the compute processes; a name may hold commas. `owners`: "pid user elapsed", as `ps` prints them."""
    seen = {words[0]: words for line in owners if len(words := line.split()) == 3}
    found = []
    for line in lines:
        if line.count(",") >= 3:
            uuid, pid, memory, name = (cell.strip() for cell in line.split(",", 3))
            _, owner, elapsed = seen.get(pid, ("", "", ""))
            found.append(
                GpuProcess(
                    gpu_uuid=uuid,
                    pid=_number(pid) or 0,
                    memory_mib=_number(memory),
                    name=name,
                    owner=owner,
                    running_for=elapsed,
                )
            )
    return tuple(found)


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None


def _word(cells: Mapping[str, str], name: str) -> str:
    """Return a cell that tells something; "" for one in brackets, and for a field that was not asked."""
    cell = cells.get(name, "")
    return "" if cell.startswith("[") else cell


def is_broken(gpu: Gpu) -> bool:
    """Return whether nvidia-smi cannot read the card: other than where a card, or a container, tells no memory."""
    return bool(gpu.unreadable) and not re.match(
        r"\[(N/A|Not Supported|Insufficient Permissions)\]", gpu.unreadable
    )


def holders(gpu: Gpu, processes: Iterable[GpuProcess]) -> list[GpuProcess]:
    """Return the processes that use a card for themselves: an MPS server only hands it on."""
    return [
        found
        for found in processes
        if found.gpu_uuid == gpu.uuid and "nvidia-cuda-mps" not in found.name
    ]


def describe_gpu(gpu: Gpu) -> str:
    """Say a card in a line."""
    memory = f"{gpu.memory_free_mib / 1024:.0f} of {gpu.memory_total_mib / 1024:.0f} GiB free"
    if gpu.unreadable and not gpu.memory_total_mib:
        memory = f"memory {gpu.unreadable}"
    words = [f"{gpu.index}: {gpu.name}, {memory}"]
    words += [f"compute capability {gpu.compute_capability}"] if gpu.compute_capability else []
    words += ["MIG on"] if gpu.mig == "Enabled" else []
    words += [f"compute mode {gpu.compute_mode}"] if gpu.compute_mode not in ("", "Default") else []
    return ", ".join(words)


def is_free(gpu: Gpu, processes: Iterable[GpuProcess]) -> bool:
    """Return whether a card seems to be unused."""
    enough = gpu.memory_free_mib >= GPU_FREE_SHARE_MIN * gpu.memory_total_mib
    return enough and not holders(gpu, processes)
