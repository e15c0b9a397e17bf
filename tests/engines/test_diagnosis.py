"""Why engines die, read from what they print.

Texts marked "seen" were printed by SGLang 0.5.21 when these mistakes were made; the others are the format strings of
SGLang 0.5.21, vLLM 0.32, transformers, huggingface_hub and torch.
"""
# ruff: noqa: E501

import pytest

from rollouts.engines.diagnosis import diagnose

NOISE = [  # seen at every start of SGLang; the last as it would look to a hasty pattern
    "[2026-11-21 01:16:13] Ignore import error when loading sglang.srt.models.bailing_moe_linear: No module named 'vllm'",
    "[2026-11-21 01:16:14] Ignore import error when loading sglang.srt.models.inkling: ModuleNotFoundError: No module"
    " named 'cutlass'",
]

# name, what the log's end says, parts of the diagnosis
CASES: list[tuple[str, str, list[str]]] = [
    (
        "port (seen, SGLang)",
        "[2026-11-21 01:30:01] ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30771): "
        "address already in use",
        ["Another process has the port", "engine.sglang_port"],
    ),
    (
        "no such directory (seen, SGLang)",
        "    raise OSError(f\"{e}\") from e\nOSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'/nowhere/model'. Use `repo_type` argument if needed.",
        ["was not found: /nowhere/model", "model.name and output.source_checkpoint"],
    ),
    (
        "hub not reached (seen, SGLang)",
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached"
        " files.\nCheck your internet connection or see how to run the library in offline mode at",
        ["could not be asked", "HF_HUB_OFFLINE"],
    ),
    (
        "no such model",
        "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.\nOSError: Qwen/Qwen9 is not a local folder and"
        " is not a valid model identifier listed on 'https://huggingface.co/models'",
        ["was not found", "a hub id, or a directory"],
    ),
    (
        "gated",
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at"
        " https://huggingface.co/google/gemma-3-1b-pt.\n401 Client Error.\n\nCannot access gated repo for url"
        " https://huggingface.co/google/gemma-3-1b-pt/resolve/main/config.json.\nAccess to model google/gemma-3-1b-pt is"
        " restricted. You must have access to it and be authenticated to access it. Please log in.",
        ["gated", "HF_TOKEN", "host.secrets"],
    ),
    (
        "architecture (seen, SGLang)",
        "ValueError: The checkpoint you are trying to load has model type `nowhere` but Transformers does not recognize"
        " this architecture. This could be because of an issue with the checkpoint",
        ["does not know the model's architecture (model type `nowhere`)", "engine.kind='embedded'"],
    ),
    (
        "model class (seen, SGLang)",
        "ValueError: Cannot find model module. 'GPTNowhereForCausalLM' is not a registered model in the Transformers"
        " library (only relevant if the model is meant to be in Transformers) and 'AutoModel' is not present",
        ["does not know the model's architecture (GPTNowhereForCausalLM)"],
    ),
    (
        "architecture, vLLM",
        "pydantic_core.ValidationError: Value error, Model architectures ['XForCausalLM'] are not supported for now.",
        ["(['XForCausalLM'])", "model.name"],
    ),
    (
        "context (seen, SGLang)",
        "ValueError: Warning: User-specified context_length (1024) is greater than the derived context_length (256). This"
        " may lead to incorrect model outputs or CUDA errors.",
        ["engine.context_length=1024 is more than the 256 tokens", "Set at most 256"],
    ),
    (
        "context, vLLM",
        "ValueError: User-specified max_model_len (9000) is greater than the derived max_model_len"
        " (max_position_embeddings=4096 or model_max_length=None in model's config.json).",
        ["engine.context_length=9000 is more than the 4096 tokens"],
    ),
    (
        "memory, torch",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.72 GiB",
        ["Out of memory.", "engine.mem_fraction", "engine.max_running_requests"],
    ),
    (
        "memory, SGLang",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value:"
        " mem_fraction_static=0.1",
        ["Out of memory.", "where the engine is alone, raise it"],
    ),
    (
        "memory, vLLM",
        "ValueError: Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired GPU memory utilization"
        " (0.8, 12.39 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        ["Out of memory. Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired"],
    ),
    (
        "driver",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver",
        ["driver does not fit the CUDA", "engine.requirements_file"],
    ),
    (
        "no device",
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a",
        ["sees no CUDA device", "nvidia-smi"],
    ),
    (
        "heads, vLLM",
        "ValueError: Total number of attention heads (14) must be divisible by tensor parallel size (4).",
        ["14 is no multiple of engine.tensor_parallel_size"],
    ),
    (
        "an unknown flag (seen, SGLang)",
        "usage: sglang serve [-h] --model-path MODEL_PATH\nsglang serve: error: unrecognized arguments: --new-flag 1",
        ["unrecognized arguments: --new-flag 1", "another release"],
    ),
    (
        "a package (seen, SGLang in the trainer's environment)",
        "    from sglang.launch_server import run_server\nModuleNotFoundError: No module named 'sglang'",
        ["has no package sglang", "engine.requirements_file"],
    ),
]


@pytest.mark.parametrize(("text", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_ending_has_its_reason(text: str, parts: list[str]) -> None:
    """Goal: one clear message with the fix, whatever was logged before. Red with a rule taken out, for its case."""
    found = diagnose([*NOISE, "Traceback (most recent call last):", *text.splitlines()])
    assert found is not None
    for part in parts:
        assert part in found
    assert "{" not in found and "None" not in found


def test_what_is_not_known_is_not_guessed() -> None:
    """Goal: no diagnosis from noise: SGLang lists optional imports at every start. Red with those lines left in."""
    assert diagnose([*NOISE, "KeyError: 'model.layers.0'"]) is None
    assert diagnose([]) is None
