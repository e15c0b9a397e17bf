"""A host's GPUs, and what CUDA programs need beside them: a part of the facts' script, and how its lines are read.

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
NVIDIA_SMI_TIMEOUT_S = 20  # it hangs where the driver waits for a broken card

# Part of the script of facts.py, in a POSIX shell; PATH is set there.
SCRIPT = """
smi() { if command -v timeout >/dev/null; then timeout @TIMEOUT@ nvidia-smi "$@"; else nvidia-smi "$@"; fi; }
smi_gpus() { smi --query-gpu="$1" --format=csv,noheader,nounits 2>&1; }
if command -v nvidia-smi >/dev/null; then
  gpu_fields=@FIELDS@,@NEWER_COMMAS@
  gpu_lines=$(smi_gpus "$gpu_fields"); gpu_rc=$?
  case $gpu_lines in *"not a valid field"*)
    gpu_fields=@FIELDS@
    for field in @NEWER_SPACES@; do
      case $(smi_gpus "index,$field") in *"not a valid field"*) ;; *) gpu_fields=$gpu_fields,$field ;; esac
    done
    gpu_lines=$(smi_gpus "$gpu_fields"); gpu_rc=$? ;;
  esac
  if [ "$gpu_rc" = 124 ]; then
    echo "gpu=nvidia-smi did not answer within @TIMEOUT@ s"
  else
    echo "gpu_fields=$gpu_fields"
    printf '%s\\n' "$gpu_lines" | sed 's/^/gpu=/'
    smi --query-compute-apps=gpu_uuid,pid,used_memory,process_name --format=csv,noheader,nounits 2>/dev/null |
      sed 's/^/gpu_process=/'
  fi
fi
echo "machine=$(uname -m)"
echo "libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || ldd --version 2>&1 | sed 1q)"
[ -d /dev/shm ] && echo "shm=$(df -Pk /dev/shm 2>/dev/null | sed -n 2p)"
[ -n "${CUDA_VISIBLE_DEVICES+set}" ] && echo "visible_devices=$CUDA_VISIBLE_DEVICES"
for setting in PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF; do
  value=$(printenv "$setting") && echo "allocator=$setting $value"
done
for compiler in c++ g++ gcc cc; do
  where=$(command -v "$compiler") && echo "compiler=$compiler $where"
done
echo "compilers_asked=yes"
if command -v ps >/dev/null; then ps -e -o comm= 2>/dev/null | grep -q '^nvidia-cuda-mps' && echo "mps=yes"
else [ -e "${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}/control" ] && echo "mps=yes"; fi
"""
SCRIPT = (
    SCRIPT.replace("@TIMEOUT@", str(NVIDIA_SMI_TIMEOUT_S))
    .replace("@FIELDS@", ",".join(FIELDS))
    .replace("@NEWER_COMMAS@", ",".join(NEWER_FIELDS))
    .replace("@NEWER_SPACES@", " ".join(NEWER_FIELDS))
)


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


@dataclass(frozen=True, kw_only=True)
class CudaHost:
    """What CUDA programs need of a host beside its cards. None and "" mean not known."""

    machine: str = ""  # "x86_64", "aarch64"
    libc: str = ""  # "glibc 2.35"
    shm_total_mib: int | None = None  # of /dev/shm
    shm_free_mib: int | None = None
    visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES as the host's own start-up files or scheduler set it
    allocator: tuple[tuple[str, str], ...] = ()  # settings of torch's allocator that the host's own files set
    compilers: tuple[str, ...] | None = None  # of c++, g++, gcc and cc those found
    mps: bool = False  # an NVIDIA MPS server shares the cards


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
    untold = next((cells[name] for name in ("memory.total", "memory.free") if _number(cells[name]) is None), "")
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


def read_processes(lines: Iterable[str]) -> tuple[GpuProcess, ...]:
    """Return the compute processes; a name may hold commas."""
    found = []
    for line in lines:
        if line.count(",") >= 3:
            uuid, pid, memory, name = (cell.strip() for cell in line.split(",", 3))
            found.append(GpuProcess(gpu_uuid=uuid, pid=_number(pid) or 0, memory_mib=_number(memory), name=name))
    return tuple(found)


def read_cuda_host(values: Mapping[str, str], compilers: Iterable[str], allocator: Iterable[str] = ()) -> CudaHost:
    """Return what the script printed of the host itself. `compilers`: "c++ /usr/bin/c++"; `allocator`: name, value."""
    shm = [int(cell) // 1024 for cell in values.get("shm", "").split()[1:4] if cell.isdigit()]
    return CudaHost(
        machine=values.get("machine", ""),
        libc=values.get("libc", ""),
        shm_total_mib=shm[0] if len(shm) == 3 else None,
        shm_free_mib=shm[2] if len(shm) == 3 else None,
        visible_devices=values.get("visible_devices"),
        allocator=tuple((line.partition(" ")[0], line.partition(" ")[2]) for line in allocator),
        compilers=tuple(line.split(" ")[0] for line in compilers) if "compilers_asked" in values else None,
        mps="mps" in values,
    )


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None


def _word(cells: Mapping[str, str], name: str) -> str:
    """Return a cell that tells something; "" for one in brackets, and for a field that was not asked."""
    cell = cells.get(name, "")
    return "" if cell.startswith("[") else cell


def is_broken(gpu: Gpu) -> bool:
    """Return whether nvidia-smi cannot read the card: other than where a card, or a container, tells no memory."""
    return bool(gpu.unreadable) and not re.match(r"\[(N/A|Not Supported|Insufficient Permissions)\]", gpu.unreadable)


def holders(gpu: Gpu, processes: Iterable[GpuProcess]) -> list[GpuProcess]:
    """Return the processes that use a card for themselves: an MPS server only hands it on."""
    return [found for found in processes if found.gpu_uuid == gpu.uuid and "nvidia-cuda-mps" not in found.name]


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
