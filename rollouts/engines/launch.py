"""Command lines of the inference servers. Pure, standard library only: the control side imports it to print a plan.

Flag names are SGLang's (`sglang.launch_server --help`), so the same words start the embedded engine and the real one.
"""

from typing import Literal

from base_config import EngineConfig, ModelConfig

HOST = "127.0.0.1"  # loopback only: weight updates and aborts are open to whoever can connect


def engine_url(engine: EngineConfig) -> str:
    """Where the engine answers, without a trailing slash."""
    return f"http://{HOST}:{engine.sglang_port}"


def engine_argv(
    engine: EngineConfig,
    model: ModelConfig,
    *,
    python: str,
    model_path: str,
    device_type: Literal["cuda", "cpu", "mps"],
    seed: int,
) -> tuple[str, ...]:
    """The command line that serves `model_path` (a Hugging Face directory with weights) at `engine_url(engine)`.

    `python` is the interpreter of the environment that holds the engine; run it from the repository's root.
    `seed` feeds the sampling of requests that bring none of their own. The device's index is not chosen here: the
    caller sets CUDA_VISIBLE_DEVICES to `engine.gpu_ranks`.
    """
    argv = (
        *(python, "-m", "rollouts.engines.embedded"),
        *("--model-path", model_path),
        *("--host", HOST),
        *("--port", str(engine.sglang_port)),
        *("--dtype", model.dtype),
        *("--device", device_type),
        *("--max-running-requests", str(engine.max_running_requests)),
        *("--mem-fraction-static", str(engine.mem_fraction)),
        *("--random-seed", str(seed)),
    )
    return (*argv, "--trust-remote-code") if model.trust_remote_code else argv
