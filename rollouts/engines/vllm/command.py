"""vLLM's command line. Pure, standard library only. `python -m vllm.entrypoints.cli.main` is what `vllm` runs."""

from rollouts.engines.server_spec import DeviceType, ServerSpec

READY_PATH = "/health"
CPU_KV_CACHE_GIB = 1  # vLLM's default takes a share of the host's memory


def argv(server: ServerSpec) -> tuple[str, ...]:
    """Return the arguments after the interpreter, run from the repository's root."""
    engine, model, cpu = server.engine, server.model, server.device_type == "cpu"
    return (
        *("-m", "vllm.entrypoints.cli.main", "serve", server.model_path),
        *("--host", server.host),
        *("--port", str(server.port)),
        *("--dtype", model.dtype),
        *("--tensor-parallel-size", str(engine.tensor_parallel_size)),
        # cpu: VLLM_CPU_KVCACHE_SPACE
        *(() if cpu else ("--gpu-memory-utilization", str(engine.mem_fraction))),
        *("--max-model-len", str(engine.context_length)),
        *("--max-num-seqs", str(engine.max_running_requests)),
        *("--seed", str(server.seed)),
        # at the sampling temperature, as the loss's ratio needs them
        *("--logprobs-mode", "processed_logprobs"),
        "--enable-scale-out",  # /inference/v1/generate: token ids in and out
        "--enable-prompt-tokens-details",  # else an answer does not say how much the prefix cache had
        *(("--enforce-eager",) if cpu else ()),
        *(("--trust-remote-code",) if model.trust_remote_code else ()),
        *("--middleware", "rollouts.engines.vllm.guard.KeyGuard"),
        "--disable-uvicorn-access-log",  # else a line per request
    )


def modules(device_type: DeviceType) -> tuple[str, ...]:
    """Name the modules that a server needs."""
    return ("vllm.entrypoints.cli.main", "rollouts.engines.vllm.guard")


def env(device_type: DeviceType, tree: str) -> dict[str, str]:
    """Return variables of the process: weight updates and pauses are routes of the development mode."""
    cpu = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB)}
    return {"VLLM_SERVER_DEV_MODE": "1", **(cpu if device_type == "cpu" else {})}
