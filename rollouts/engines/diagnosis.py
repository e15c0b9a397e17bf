"""Why an engine died, read from its log: one sentence with the fix. Pure, standard library only.

The patterns are what SGLang 0.5.2x, vLLM 0.3x, transformers, huggingface_hub and torch print. The first rule
that matches the log's last lines decides, so specific rules come before general ones.
"""

import re
from collections.abc import Sequence

# SGLang tries all of its model files when it starts, and logs which of them this environment cannot import.
HARMLESS = re.compile(r"Ignore import error when loading")

# Tools that are missing for compiling kernels at the start, and mistakes that CUDA's libraries refuse.
CUDA_RULES: Sequence[tuple[str, str]] = (
    (
        r"fatal error: Python\.h: No such file|include file 'Python\.h' not found",
        "Triton compiles a driver when it is first used, and the engine's Python has no headers (Python.h). On the"
        " host:"
        " apt-get install python3-dev of that version; a Python that uv installs has them.",
    ),
    (
        r"No such file or directory: 'ninja'|Ninja is required to load C\+\+ extensions|ninja: (?:command )?not found",
        "The engine compiles kernels when it starts, and found no ninja. Its environment's bin belongs first on PATH:"
        " check that engine.requirements_file lists ninja, and that host.env sets no PATH that hides it.",
    ),
    (
        r"nvcc: (?:command )?not found|No such file or directory: '[^']*/?nvcc'|Could not find nvcc"
        r"|CUDA_HOME environment variable is not set|nvcc: No such file",
        "The engine compiles kernels when it starts, and found no nvcc. Check that engine.requirements_file lists"
        " nvidia-cuda-nvcc, or install the CUDA toolkit of its version on the host and name it as CUDA_HOME in"
        " host.env.",
    ),
    (
        r"CUDA compiler and CUDA toolkit headers are incompatible",
        "The nvcc that the engine found and the CUDA headers beside it are of different versions. Pin nvidia-cuda-nvcc,"
        " nvidia-nvvm, nvidia-cuda-crt and nvidia-cuda-cccl of nvidia-cuda-runtime's version in"
        " engine.requirements_file,"
        " or take CUDA_HOME out of host.env.",
    ),
    (
        r"unsupported GNU version|gcc versions later than \d+ are not supported",
        "The host's g++ is newer than the engine's nvcc takes. Install an older one there and name it as CXX and"
        " NVCC_PREPEND_FLAGS='-ccbin <g++>' in host.env.",
    ),
    (
        r"(?:sh: \d+: |: )c\+\+: (?:command )?not found|No such file or directory: '(?:c\+\+|g\+\+|gcc|cc)'"
        r"|Failed to find C compiler|Please specify via CC environment variable|cannot execute 'cc1plus'",
        "The engine compiles kernels when it starts, and the host has no C++ compiler. On the host: apt-get install"
        " g++.",
    ),
    (
        r"(?P<library>libcudart\.so\.\d+|libcublas\.so\.\d+|libnvrtc\.so\.\d+): cannot open shared object file"
        r"|cannot find -l(?P<linked>cudart|cuda|cublas)\b",
        "A CUDA library was not found ({library}{linked}): the engine's environment lacks its wheel, or has one of"
        " another CUDA than the package that needs it. Check that engine.requirements_file is a lock of one CUDA"
        " version, and that host.env sets no LD_LIBRARY_PATH, LD_PRELOAD or CUDA_HOME of another.",
    ),
    (
        r"Mismatched NCCL version detected[^\n]*",
        "Trainer and engine have different versions of NCCL, and NCCL refuses that. Give both the same torch:"
        " host.constraints_file='rollouts:requirements/trainer-cuda.txt', or set engine.weight_sync=DiskSync(...).",
    ),
    (
        r"Invalid device_uuid=?(?P<uuid>\S*)",
        "The trainer's weights are on a GPU that the engine does not see ({uuid}): weight_sync=TensorSync(...) shares"
        " memory of one device. Put the trainer's first rank and the engine on the same GPU, or set"
        " engine.weight_sync=DiskSync(...).",
    ),
    (
        r"memory capacity is unbalanced",
        "The engine's devices have different amounts of free memory: something else holds memory on one of them"
        " (`nvidia-smi` shows it). With engine.tensor_parallel_size above 1, choose engine.gpu_ranks that are all free,"
        " or all shared with the trainer alike.",
    ),
    (
        r"no kernel image is available for execution on the device|not compatible with the current PyTorch installation"
        r"|Unsupported gpu architecture '(?P<arch>[^']+)'",
        "The engine's kernels were not built for this GPU's generation {arch}. A newer card needs a build for a"
        " newer CUDA (and its driver), a card before Ampere an older engine: choose another lock in"
        " engine.requirements_file.",
    ),
    (
        r"version `(?P<glibc>GLIBC_[\d.]+)' not found",
        "The host's C library is older than the engine needs ({glibc}): `ldd --version` shows it. Choose a host with a"
        " newer distribution (Ubuntu 22.04 or Debian 12 have 2.35 and 2.36), or run in a container of one.",
    ),
)

# What installers print when a lock does not fit the host.
INSTALL_RULES: Sequence[tuple[str, str]] = (
    (
        r"wheel_stub|special placeholder package|The installation of (?P<stub>\S+) for version \S+ failed",
        "A package of NVIDIA's is a placeholder on the public index: its installation downloads it from NVIDIA's index,"
        " which this host does not reach. Pin a version that has a wheel, or mark what requires it `#"
        " no-deps`"
        " (requirements/README.md).",
    ),
    (
        r"can't find Rust compiler|Cargo, the Rust package manager, is not installed|Failed (?:building wheel for"
        r"|to build)"
        r" `?(?P<rust>outlines[-_]core)",
        "A package has no wheel for this Python, and its source needs Rust (outlines-core has none for 3.13 and newer)."
        " The locks are for Python 3.11 and 3.12: install one of them on the host, or let the run bring it.",
    ),
    (
        r"You're using (?P<python>CPython [\d.]+)[^\n]*only has wheels|no wheels with a matching Python (?:ABI"
        r"|version|impl)",
        "A package has no wheel for this Python {python}. The locks are for Python 3.11 and 3.12: install one of"
        " them on the"
        " host, or let the run bring it.",
    ),
    (
        r"You're on (?P<system>[^,\n]+), but[^\n]*only has wheels|no wheels with a matching platform tag"
        r"|version `(?P<glibc>GLIBC_[\d.]+)' not found",
        "A package has no wheel for this host {system}{glibc}: its C library is older than the package needs"
        " (SGLang: glibc"
        " 2.34), or it is another architecture. Choose a host with a newer distribution, such as Ubuntu 22.04 or"
        " Debian 12.",
    ),
    (
        # Not where pip alone cannot find the pinned version: it calls that a conflict with the constraint too.
        r"\A(?![\s\S]*The user requested (?P<alone>[\w.-]+)\s+The user requested \(constraint\) (?P=alone)==)"
        r"[\s\S]*(?:ResolutionImpossible|conflicting dependencies)"
        r"|No solution found[^\n]*\n[^\n]*Because you require",
        "Two of the requirements contradict each other, or the constraints: the lines before name both. Change"
        " host.requirements so that it fits host.constraints_file, whose versions are one tested set; or name other"
        " constraints.",
    ),
    (
        r"No space left on device|Errno 28\b",
        "The host's disk is full. Free some space there, or set ROLLOUTS_HOME on the host to a larger disk.",
    ),
)

RULES: Sequence[tuple[str, str]] = (
    *CUDA_RULES,
    (
        r"gated repo|GatedRepoError|Access to model (?P<gated>\S+) is restricted",
        "The model {gated} is gated, and the hub was asked without a token that has access. Accept its licence on its"
        " page, export HF_TOKEN here and put 'HF_TOKEN' into host.secrets.",
    ),
    (
        r"couldn't connect to 'https?://[^']+' to load|LocalEntryNotFoundError|OfflineModeIsEnabled"
        r"|Cannot reach \S+: offline mode is enabled",
        "The model is not in this host's cache, and the hub was not reached (no connection, or HF_HUB_OFFLINE=1 in"
        " host.env). Check model.name, take HF_HUB_OFFLINE out, or copy the model to the host and name its directory.",
    ),
    (
        r"Repo id must be in the form '[^']*(?:' or '[^']*)?': '(?P<repo>[^']+)'"
        r"|RepositoryNotFoundError|(?P<name>\S+) is not a local folder and is not a valid model identifier"
        r"|No such file or directory: '(?P<file>[^']+config\.json)'"
        r"|(?P<directory>\S+) does not appear to have a file named config\.json"
        r"|(?P<weights>Cannot find any model weights with \S+)",
        "The model was not found: {repo}{name}{file}{directory}{weights}. Check model.name and"
        " output.source_checkpoint: a hub id, or a directory on the host in Hugging Face layout.",
    ),
    (
        r"(?i:address already in use)|Errno 98\b|Port (?P<port>\d+ )?is already in use",
        "Another process uses the port. Set another engine.sglang_port, or end that process (`ss -ltnp` shows it).",
    ),
    (
        r"NVIDIA driver on your system is too old"
        r"|CUDA driver version is insufficient for CUDA runtime version"
        r"|forward compatibility was attempted on non supported HW"
        r"|Driver/library version mismatch",
        "The host's NVIDIA driver does not fit the CUDA that the engine was built for. Update the driver"
        " (`nvidia-smi` shows the newest CUDA that it runs), or choose an older engine in engine.requirements_file.",
    ),
    (
        r"Found no NVIDIA driver on your system|Torch not compiled with CUDA enabled|No CUDA GPUs are available"
        r"|libcuda\.so\.1: cannot open shared object file|No accelerator \(CUDA",
        "The engine sees no CUDA device. Check `nvidia-smi` on the host and engine.gpu_ranks; its environment"
        " needs a CUDA build of torch (engine.requirements_file).",
    ),
    (
        r"OutOfMemoryError|(?i:CUDA(?: error:)? out of memory)|Not enough memory\. Please try to increase"
        r"|No available memory for the cache blocks|leave no GPU memory for the KV cache"
        r"|(?P<free>Free memory on device .*? GiB\) on startup is less than desired .*? GiB\)\. )"
        r"|is larger than the available KV cache|can't allocate memory: you tried to allocate"
        r"|(?:Prefill|Decode) out of memory|Cannot allocate memory",
        "Out of memory. {free}Where trainer and engine share a device, lower engine.mem_fraction so that both fit;"
        " where the engine is alone, raise it. Less is needed with a smaller engine.max_total_tokens,"
        " engine.max_running_requests or engine.context_length, or a larger engine.tensor_parallel_size.",
    ),
    (
        r"User-specified (?:context_length|max_model_len) \((?P<asked>\d+)\) is greater than the derived \w+"
        r" \((?:\w+=)?(?P<most>\d+)",
        "engine.context_length={asked} is more than the {most} tokens that the model was made for. Set at most {most}.",
    ),
    (
        r"(?P<arch>model type `[^`]+`) but Transformers does not recognize|Model architectures (?P<archs>\[[^\]]*\])"
        r" (?:are not supported|failed to be inspected)|'(?P<module_class>\w+)' is not a registered model in the Trans",
        "This engine does not know the model's architecture ({arch}{archs}{module_class}). Serve another model.name,"
        " pin a newer engine in engine.requirements_file, or set engine=Embedded(...), which serves models of"
        " transformers.",
    ),
    (
        r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size"
        r"|AssertionError: (?P<number>\d+) is not divisible by \d+",
        "The model cannot be split over so many devices: {heads}{number} is not a multiple of"
        " engine.tensor_parallel_size."
        " Set one that divides its attention heads.",
    ),
    (
        r"error: (?P<flags>unrecognized arguments: .+|argument --\S+: invalid .+)",
        "The engine rejects its command line ({flags}): its release is not one of those in 'rollouts:requirements/…'."
        " Set engine.requirements_file to one of these locks.",
    ),
    (
        r"ModuleNotFoundError: No module named '(?P<module>[^']+)'",
        "The engine's environment lacks the package {module}. Check that engine.requirements_file is the lock for this"
        " kind of engine and target.device_type.",
    ),
)


def diagnose(lines: Sequence[str]) -> str | None:
    """Return why the engine that logged `lines` died, with the fix; None where no known cause is in them."""
    return _first(RULES, [line for line in lines if not HARMLESS.search(line)])


def diagnose_installation(lines: Sequence[str]) -> str | None:
    """Return why the installer that printed `lines` failed, with the fix; None where no known cause is in them."""
    return _first(INSTALL_RULES, lines)


def _first(rules: Sequence[tuple[str, str]], lines: Sequence[str]) -> str | None:
    text = "\n".join(lines)
    for pattern, message in rules:
        found = re.search(pattern, text)
        if found:
            said = message.format(
                **{name: value or "" for name, value in found.groupdict().items()}
            )
            return said.replace(" ()", "").replace("  ", " ").replace(" .", ".").replace(" :", ":")
    return None
