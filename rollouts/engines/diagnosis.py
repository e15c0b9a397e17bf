"""Why an engine died, from what it logged: one sentence with the fix. Pure, standard library only.

The patterns are what SGLang 0.5.2x, vLLM 0.3x, transformers, huggingface_hub and torch print. The first rule that the
log's last lines meet decides, so what is specific stands before what is general.
"""

import re
from collections.abc import Sequence

# SGLang tries every model file that it has when it starts, and says which ones this environment cannot import.
HARMLESS = re.compile(r"Ignore import error when loading")

RULES: Sequence[tuple[str, str]] = (
    (
        r"gated repo|GatedRepoError|Access to model (?P<gated>\S+) is restricted",
        "The model {gated} is gated, and the hub was asked without a token that may have it. Accept its licence on its"
        " page, export HF_TOKEN here and put 'HF_TOKEN' into host.secrets.",
    ),
    (
        r"couldn't connect to 'https?://[^']+' to load|LocalEntryNotFoundError|OfflineModeIsEnabled"
        r"|Cannot reach \S+: offline mode is enabled",
        "The model is not in this host's cache, and the hub could not be asked (no connection, or HF_HUB_OFFLINE=1 in"
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
        "Another process has the port. Set another engine.sglang_port, or end that process (`ss -ltnp` shows it).",
    ),
    (
        r"NVIDIA driver on your system is too old"
        r"|CUDA driver version is insufficient for CUDA runtime version"
        r"|forward compatibility was attempted on non supported HW"
        r"|no kernel image is available for execution on the device"
        r"|Driver/library version mismatch",
        "The host's NVIDIA driver does not fit the CUDA that the engine was built for. Update the driver"
        " (`nvidia-smi` shows what it can run), or choose an older engine in engine.requirements_file.",
    ),
    (
        r"Found no NVIDIA driver on your system|Torch not compiled with CUDA enabled|No CUDA GPUs are available"
        r"|libcuda\.so\.1: cannot open shared object file|No accelerator \(CUDA",
        "The engine sees no CUDA device. Check `nvidia-smi` on the host and engine.gpu_ranks; its environment has to"
        " hold a CUDA build of torch (engine.requirements_file).",
    ),
    (
        r"OutOfMemoryError|(?i:CUDA(?: error:)? out of memory)|Not enough memory\. Please try to increase"
        r"|No available memory for the cache blocks"
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
        " pin a newer engine in engine.requirements_file, or set engine.kind='embedded', which serves what transformers"
        " has.",
    ),
    (
        r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size"
        r"|AssertionError: (?P<number>\d+) is not divisible by \d+",
        "The model cannot be split over so many devices: {heads}{number} is no multiple of engine.tensor_parallel_size."
        " Set one that divides its attention heads.",
    ),
    (
        r"error: (?P<flags>unrecognized arguments: .+|argument --\S+: invalid .+)",
        "The engine does not take its command line ({flags}): it is another release than those in requirements/. Set"
        " engine.requirements_file to one of these locks.",
    ),
    (
        r"ModuleNotFoundError: No module named '(?P<module>[^']+)'",
        "The engine's environment has no package {module}. Check that engine.requirements_file is the lock for this"
        " engine.kind and target.device_type.",
    ),
)


def diagnose(lines: Sequence[str]) -> str | None:
    """Why the engine that logged `lines` died, with the fix; None where no known cause is in them."""
    text = "\n".join(line for line in lines if not HARMLESS.search(line))
    for pattern, message in RULES:
        found = re.search(pattern, text)
        if found:
            return message.format(**{name: value or "" for name, value in found.groupdict().items()})
    return None
