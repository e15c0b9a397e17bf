"""What the facts' script asks of a host's GPUs, and of what CUDA programs need beside them.

How its lines about cards are read: rollouts/machine/nvidia_smi.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rollouts.machine.nvidia_smi import FIELDS, NEWER_FIELDS, NVIDIA_SMI_TIMEOUT_S, PROCESS_FIELDS

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
    gpu_apps=$(smi --query-compute-apps=@PROCESS_FIELDS@ --format=csv,noheader,nounits 2>/dev/null)
    printf '%s\\n' "$gpu_apps" | sed 's/^/gpu_process=/'
    gpu_pids=$(printf '%s\\n' "$gpu_apps" | cut -d, -f2 | tr -d ' ' | grep '^[0-9][0-9]*$' | tr '\\n' ',')
    [ -n "$gpu_pids" ] && ps -o pid= -o user= -o etime= -p "${gpu_pids%,}" 2>/dev/null | sed 's/^/gpu_owner=/'
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
    .replace("@PROCESS_FIELDS@", ",".join(PROCESS_FIELDS))
    .replace("@NEWER_COMMAS@", ",".join(NEWER_FIELDS))
    .replace("@NEWER_SPACES@", " ".join(NEWER_FIELDS))
)


@dataclass(frozen=True, kw_only=True)
class CudaHost:
    """What CUDA programs need of a host beside its cards. None and "" mean not known."""

    machine: str = ""  # "x86_64", "aarch64"
    libc: str = ""  # "glibc 2.35"
    shm_total_mib: int | None = None  # of /dev/shm
    shm_free_mib: int | None = None
    visible_devices: str | None = (
        None  # CUDA_VISIBLE_DEVICES as the host's own start-up files or scheduler set it
    )
    # settings of torch's allocator that the host's own files set
    allocator: tuple[tuple[str, str], ...] = ()
    compilers: tuple[str, ...] | None = None  # of c++, g++, gcc and cc those found
    mps: bool = False  # an NVIDIA MPS server shares the cards


def read_cuda_host(
    values: Mapping[str, str], compilers: Iterable[str], allocator: Iterable[str] = ()
) -> CudaHost:
    """Return what the script printed of the host itself. `compilers`: "c++ /usr/bin/c++"; `allocator`: name, value."""
    shm = [int(cell) // 1024 for cell in values.get("shm", "").split()[1:4] if cell.isdigit()]
    return CudaHost(
        machine=values.get("machine", ""),
        libc=values.get("libc", ""),
        shm_total_mib=shm[0] if len(shm) == 3 else None,
        shm_free_mib=shm[2] if len(shm) == 3 else None,
        visible_devices=values.get("visible_devices"),
        allocator=tuple((line.partition(" ")[0], line.partition(" ")[2]) for line in allocator),
        compilers=tuple(line.split(" ")[0] for line in compilers)
        if "compilers_asked" in values
        else None,
        mps="mps" in values,
    )
