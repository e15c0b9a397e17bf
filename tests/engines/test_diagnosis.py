"""Why engines die, read from what they print.

Texts marked "seen" were printed by SGLang 0.5.21 when these mistakes were made; the others are the format strings of
SGLang 0.5.21, vLLM 0.32, transformers, huggingface_hub and torch.
"""
# ruff: noqa: E501

import pytest

from rollouts.engines.diagnosis import diagnose, diagnose_installation

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
        ["Another process uses the port", "engine.sglang_port"],
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
        ["hub was not reached", "HF_HUB_OFFLINE"],
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
        ["does not know the model's architecture (model type `nowhere`)", "engine=Embedded(...)"],
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
        [
            "Out of memory. Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired"
        ],
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
        "Python.h (public report, SGLang)",
        "/tmp/tmps1rkq3y3/main.c:5:10: fatal error: Python.h: No such file or directory\n    5 | #include <Python.h>\n"
        "      |          ^~~~~~~~~~\ncompilation terminated.\n\nException in run_tp_server:",
        ["Python.h", "python3-dev"],
    ),
    (
        "Python.h, another compiler (public report)",
        "cuda_utils.c:6: error: include file 'Python.h' not found\nsubprocess.CalledProcessError: Command '['tcc.exe'",
        ["Python.h", "python3-dev"],
    ),
    (
        "ninja (public report)",
        "    raise child_exception_type(errno_num, err_msg, err_filename)\nFileNotFoundError: [Errno 2] No such file or"
        " directory: 'ninja': 'ninja'",
        ["found no ninja", "engine.requirements_file"],
    ),
    (
        "ninja, torch's words (public report)",
        '    raise RuntimeError("Ninja is required to load C++ extensions")\nRuntimeError: Ninja is required to load C++'
        " extensions",
        ["found no ninja", "PATH"],
    ),
    (
        "nvcc (public report, SGLang on a host with a driver alone)",
        "RuntimeError: ninja exited with status 127\n/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found",
        ["found no nvcc", "nvidia-cuda-nvcc", "CUDA_HOME"],
    ),
    (
        "nvcc, SGLang 0.5.21",
        "RuntimeError: Failed to build JIT module silu_and_mul in /root/.cache/sglang/jit/x\nstdout:\n[1/2]"
        " /usr/local/cuda/bin/nvcc -MD -MF cuda_0.o.d -c cuda.cu -o cuda_0.o\nFAILED: [code=127] cuda_0.o\n/bin/sh: 1:"
        " /usr/local/cuda/bin/nvcc: not found\nninja: build stopped: subcommand failed.",
        ["found no nvcc"],
    ),
    (
        "headers of another CUDA (seen, nvcc 13.5 beside a runtime of 13.0)",
        'cuda_toolkit.h:41:8: error: #error "CUDA compiler and CUDA toolkit headers are incompatible, please check your'
        ' include paths"',
        ["of different versions", "nvidia-cuda-cccl"],
    ),
    (
        "a compiler that is too new (public report)",
        "host_config.h:132: #error -- unsupported GNU version! gcc versions later than 12 are not supported!",
        ["g++ is newer than the engine's nvcc takes", "CXX"],
    ),
    (
        "no compiler, Triton",
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable or set"
        " triton.knobs.build.impl.",
        ["no C++ compiler", "apt-get install g++"],
    ),
    (
        "no compiler, the link",
        "FAILED: [code=127] silu.so\nc++ main.o -shared -o silu.so\n/bin/sh: 1: c++: not found",
        ["no C++ compiler"],
    ),
    (
        "libcudart (public report, SGLang's memory saver)",
        "/venv/bin/python: error while loading shared libraries: libcudart.so.13: cannot open shared object file: No such"
        " file or directory\nRuntimeError: Rank 0 scheduler died during initialization (exit code: 127).",
        ["(libcudart.so.13)", "one CUDA version", "LD_LIBRARY_PATH"],
    ),
    (
        "libcudart, linking",
        "/usr/bin/ld: cannot find -lcudart: No such file or directory\ncollect2: error: ld returned 1 exit status",
        ["(cudart)", "CUDA_HOME"],
    ),
    (
        "NCCL (NCCL's format string)",
        "gpu-7:4711:4711 [0] NCCL WARN Mismatched NCCL version detected : rank 1 version 22907 rank 0 version 23007\n"
        "torch.distributed.DistBackendError: NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)",
        [
            "different versions of NCCL",
            "requirements/trainer-cuda.txt",
            "weight_sync=DiskSync(...)",
        ],
    ),
    (
        "a GPU that is not the engine's (SGLang's words)",
        '  File "/srt/utils/patch_torch.py", line 97, in _device_from_maybe_uuid\nException: Invalid'
        " device_uuid=GPU-5f2c1d0a-1111-2222-3333-444455556666",
        ["(GPU-5f2c1d0a-1111-2222-3333-444455556666)", "weight_sync=DiskSync(...)"],
    ),
    (
        "unbalanced (public report, SGLang)",
        "ValueError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes."
        " min_per_gpu_memory=20.1, local_gpu_memory=78.8",
        ["different amounts of free memory", "engine.gpu_ranks"],
    ),
    (
        "no room for the cache (SGLang's words)",
        "ValueError: Loaded weights leave no GPU memory for the KV cache under mem_fraction_static=0.5",
        ["Out of memory.", "engine.mem_fraction"],
    ),
    (
        "no kernel image (torch's words)",
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"
        " might be asynchronously reported at some other API call",
        ["not built for this GPU's generation.", "engine.requirements_file"],
    ),
    (
        "an architecture that nvcc does not know",
        "nvcc fatal   : Unsupported gpu architecture 'compute_120'",
        ["this GPU's generation compute_120."],
    ),
    (
        "glibc",
        "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by common_ops.abi3.so)",
        ["(GLIBC_2.34)", "newer distribution"],
    ),
    (
        "heads, vLLM",
        "ValueError: Total number of attention heads (14) must be divisible by tensor parallel size (4).",
        ["14 is not a multiple of engine.tensor_parallel_size"],
    ),
    (
        "an unknown flag (seen, SGLang)",
        "usage: sglang serve [-h] --model-path MODEL_PATH\nsglang serve: error: unrecognized arguments: --new-flag 1",
        ["unrecognized arguments: --new-flag 1", "is not one of those in 'rollouts:requirements"],
    ),
    (
        "a package (seen, SGLang in the trainer's environment)",
        "    from sglang.launch_server import run_server\nModuleNotFoundError: No module named 'sglang'",
        ["lacks the package sglang", "engine.requirements_file"],
    ),
]


@pytest.mark.parametrize(
    ("text", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
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


INSTALLATIONS: list[tuple[str, str, list[str]]] = [
    (
        "a placeholder of NVIDIA's (public report)",
        '  File "/tmp/pip-build-env/overlay/lib/python3.11/site-packages/wheel_stub/error.py", line 67, in'
        " report_install_failure\nInstallFailedError: The installation of cuda-tile for version 1.6.0rc5 failed.\n"
        "This is a special placeholder package which downloads a real wheel package from NVIDIA's index.",
        ["NVIDIA's index", "requirements/README.md"],
    ),
    (
        "Rust (public report, pip)",
        "running build_rust\nerror: can't find Rust compiler\n  ERROR: Failed building wheel for outlines-core\nFailed to"
        " build outlines-core",
        ["needs Rust", "3.11 and 3.12"],
    ),
    (
        "Rust (uv)",
        "  × Failed to build `outlines-core==0.1.26`\n  ├─▶ The build backend returned an error",
        ["needs Rust"],
    ),
    (
        "another Python (uv)",
        "hint: You're using CPython 3.14 (`cp314`), but `cuda-python` (v13.4.4) only has wheels with the following Python"
        " ABI tags: `cp311`, `cp312`",
        ["no wheel for this Python CPython 3.14", "3.11 and 3.12"],
    ),
    (
        "an old C library (uv)",
        "Because sglang==0.5.21 has no wheels with a matching platform tag (e.g., `manylinux_2_31_x86_64`) and you require"
        " sglang==0.5.21, we can conclude that your requirements are unsatisfiable.",
        ["C library is older", "glibc 2.34"],
    ),
    (
        "a pin of the constraints (seen, pip)",
        "    The user requested idna==3.10\n    The user requested (constraint) idna==3.20\n\nTo fix this you could try to:\n"
        "ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/",
        ["contradict each other", "host.requirements"],
    ),
    (
        "a pin of the constraints (seen, uv)",
        "error: No solution found when resolving dependencies\n  cause: Because you require idna==3.10 and idna==3.20, we"
        " can conclude that your requirements are unsatisfiable.",
        ["contradict each other", "host.constraints_file"],
    ),
    (
        "a full disk",
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
        ["disk is full", "ROLLOUTS_HOME"],
    ),
]


@pytest.mark.parametrize(
    ("text", "parts"), [case[1:] for case in INSTALLATIONS], ids=[case[0] for case in INSTALLATIONS]
)
def test_each_failed_installation_has_its_reason(text: str, parts: list[str]) -> None:
    """Goal: an installer's pages come down to the sentence that helps. Red with a rule taken out, for its case."""
    found = diagnose_installation(["Collecting torch==2.13.0", *text.splitlines()])
    assert found is not None
    for part in parts:
        assert part in found
    assert "{" not in found and "None" not in found
    assert (
        diagnose_installation(["ERROR: No matching distribution found for nothing-of-the-kind"])
        is None
    )
