"""SGLang's command line, on CUDA and without a GPU. Pure, standard library only.

Flags as in `python -m sglang.launch_server --help` of the releases that requirements/sglang-*.txt pin. The started
module is ours (launcher.py), for the keys; all flags are SGLang's.
"""

import math
import posixpath
from collections.abc import Sequence

from rollouts.engines.server_spec import DeviceType, ServerSpec

READY_PATH = "/ready"  # cheap; /health samples a token
# fused ones included
ALL_LINEAR = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
CPU_FLAGS = (
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--enable-deterministic-inference",  # else requests' seeds are ignored; it is slow only with a GPU's kernels
)
GRAPH_BATCH_MAX = (
    256  # the largest batch that SGLang captures graphs for by default, on cards of 60 GiB and more
)

ROUTER_READY_PATH = "/readiness"  # 200 once one replica can serve
ROUTER_FLAGS = (
    # The rows of a prompt, and an agent's next turn, go to the replica that has their prefix in its cache, unless
    # another has so much less to do. The defaults would let 64 requests pile up on one.
    *("--policy", "cache_aware", "--balance-abs-threshold", "4", "--balance-rel-threshold", "1.2"),
    "--disable-retries",  # the trainer retries a request itself, once it knows which weights will answer
    # After refusing one request a replica gets the next when it answers again, a second later at the earliest.
    *(
        "--cb-failure-threshold",
        "1",
        "--cb-success-threshold",
        "1",
        "--cb-timeout-duration-secs",
        "1",
    ),
    *(
        "--health-failure-threshold",
        "1",
        "--health-success-threshold",
        "1",
        "--health-check-interval-secs",
        "1",
    ),
    # answered during a pause too, unlike /health and /ready
    *("--health-check-endpoint", "/model_info"),
    *("--health-check-timeout-secs", "10"),
    *("--shutdown-grace-period-secs", "1"),
    *("--log-level", "warn"),
)


def argv(server: ServerSpec) -> tuple[str, ...]:
    """Return the arguments after the interpreter, run from the repository's root."""
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
        *(
            ("--max-total-tokens", str(engine.max_total_tokens))
            if engine.max_total_tokens is not None
            else ()
        ),
        *("--max-running-requests", str(engine.max_running_requests)),
        *("--random-seed", str(server.seed)),
        *("--log-level-http", "warning"),  # else a line per request
        "--sleep-on-idle",  # the scheduler would spin on a core while the trainer steps
        *(CPU_FLAGS if cpu else _graph_flags(server)),
        *_adapter_flags(server),
        *(("--enable-memory-saver",) if engine.sleep_while_training else ()),
        *(("--trust-remote-code",) if model.trust_remote_code else ()),
    )


def modules(device_type: DeviceType) -> tuple[str, ...]:
    """Name the modules that a server needs: ours first, which puts in place what a CPU lacks."""
    ours = f"rollouts.engines.sglang.{'cpu_launcher' if device_type == 'cpu' else 'launcher'}"
    return (ours, "sglang.launch_server", "sglang.srt.entrypoints.http_server")


def _graph_flags(server: ServerSpec) -> tuple[str, ...]:
    """Return flags for decode graphs of every batch size that the config samples.

    By default SGLang stops at a batch of 32 or 48 on cards below 60 GiB, and decodes larger ones step by step.
    """
    return (
        "--cuda-graph-max-bs-decode",
        str(min(server.engine.max_running_requests, GRAPH_BATCH_MAX)),
    )


def _adapter_flags(server: ServerSpec) -> tuple[str, ...]:
    """Return flags for one adapter at a time. By default SGLang takes Triton's kernels."""
    lora = server.model.lora
    if server.engine.weight_sync.kind != "lora" or lora is None:
        return ()
    names = ALL_LINEAR if lora.target_modules == "all-linear" else lora.target_modules
    return (
        "--enable-lora",
        *("--max-lora-rank", str(lora.rank)),
        *("--max-loras-per-batch", "1"),
        *("--lora-target-modules", *dict.fromkeys(name.rpartition(".")[2] for name in names)),
        *(("--lora-backend", "torch_native") if server.device_type == "cpu" else ()),
    )


def router_argv(
    host: str, port: int, replica_urls: Sequence[str], *, timeout_s: float
) -> tuple[str, ...]:
    """Return the arguments of the router in front of `replica_urls`; `timeout_s` bounds each request."""
    return (
        *("-m", "rollouts.engines.sglang.router_launcher"),
        *("--host", host),
        *("--port", str(port)),
        *("--worker-urls", *replica_urls),
        *("--request-timeout-secs", str(math.ceil(timeout_s))),
        *ROUTER_FLAGS,
    )


def env(device_type: DeviceType, tree: str) -> dict[str, str]:
    """Return variables of the process; `tree` is the repository on the host."""
    if device_type != "cpu":
        return {}
    stubs = posixpath.join(tree, "rollouts/engines/sglang/cpu_stubs")
    return {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": stubs}
