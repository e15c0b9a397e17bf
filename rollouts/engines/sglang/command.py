"""SGLang's command line, on CUDA and without a GPU. Pure, standard library only.

Flags as in `python -m sglang.launch_server --help` of the releases that requirements/sglang-*.txt pin. The module that
is started is ours (launcher.py), for the keys; all flags are SGLang's.
"""

import posixpath

from rollouts.engines.command import DeviceType, Server

READY_PATH = "/ready"  # cheap; /health samples a token
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # fused ones included
CPU_FLAGS = (
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--enable-deterministic-inference",  # requests' seeds count; the kernels that make it slow are a GPU's
    "--sleep-on-idle",  # the scheduler would spin on a core while the trainer steps
)


def argv(server: Server) -> tuple[str, ...]:
    """What follows the interpreter, from the repository's root."""
    engine, model, cpu = server.engine, server.model, server.device_type == "cpu"
    return (
        *("-m", f"rollouts.engines.sglang.{'cpu_launcher' if cpu else 'launcher'}"),
        *("--model-path", server.model_path),
        *("--host", server.host),
        *("--port", str(server.port)),
        *("--dtype", model.dtype),
        *("--device", server.device_type),
        *("--tensor-parallel-size", str(engine.tensor_parallel_size)),
        *("--mem-fraction-static", str(engine.mem_fraction)),
        *("--context-length", str(engine.context_length)),
        *(("--max-total-tokens", str(engine.max_total_tokens)) if engine.max_total_tokens != -1 else ()),
        *("--max-running-requests", str(engine.max_running_requests)),
        *("--random-seed", str(server.seed)),
        *("--log-level-http", "warning"),  # else a line per request
        *(CPU_FLAGS if cpu else ()),
        *_adapter_flags(server),
        *(("--enable-memory-saver",) if engine.sleep_while_training else ()),
        *(("--trust-remote-code",) if model.trust_remote_code else ()),
    )


def _adapter_flags(server: Server) -> tuple[str, ...]:
    """Room for one adapter at a time. The kernels that SGLang takes by itself are Triton's."""
    lora = server.model.lora
    if server.engine.weight_sync != "lora" or lora is None:
        return ()
    names = ALL_LINEAR if lora.target_modules == "all-linear" else lora.target_modules
    return (
        "--enable-lora",
        *("--max-lora-rank", str(lora.rank)),
        *("--max-loras-per-batch", "1"),
        *("--lora-target-modules", *dict.fromkeys(name.rpartition(".")[2] for name in names)),
        *(("--lora-backend", "torch_native") if server.device_type == "cpu" else ()),
    )


def env(device_type: DeviceType, tree: str) -> dict[str, str]:
    """Variables of the process; `tree` is the repository on the host."""
    if device_type != "cpu":
        return {}
    stubs = posixpath.join(tree, "rollouts/engines/sglang/cpu_stubs")
    return {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": stubs}
