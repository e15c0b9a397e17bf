"""Checks of the engine, and of how weights reach it."""

from rollouts.config.checks.needs import Checks, at_least_one, must, names_file, rank_checks
from rollouts.config.schema import (
    VLLM,
    BroadcastSync,
    Embedded,
    EngineConfig,
    LoraSync,
    Sections,
    SGLang,
    TensorSync,
)

SGLANG_LORA_TARGETS = (  # linear layers that SGLang has adapters for
    *(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
    ),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
# torch's older and newer name
ALLOCATOR_SETTINGS = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def engine_checks(engine: EngineConfig) -> Checks:
    if engine.hosts is not None:
        ok = bool(engine.hosts) and len(set(engine.hosts)) == len(engine.hosts)
        need = "hosts of the job by number, 0 the first, each once; or None: the first host, alone"
        yield must(ok and min(engine.hosts) >= 0, "engine.hosts", engine.hosts, need)
    yield from rank_checks(engine.gpu_ranks, "engine.gpu_ranks")
    needed = engine.replicas * engine.tensor_parallel_size
    need = f"length {needed}: replicas={engine.replicas} x tensor_parallel_size={engine.tensor_parallel_size}"
    counts_ok = needed < 1 or len(engine.gpu_ranks) == needed
    yield must(counts_ok, "engine.gpu_ranks", engine.gpu_ranks, need)
    yield from at_least_one(
        engine,
        "engine",
        "tensor_parallel_size",
        "replicas",
        "context_length",
        "max_running_requests",
    )
    if isinstance(engine.weight_sync, TensorSync | BroadcastSync):
        yield from at_least_one(engine.weight_sync, "engine.weight_sync", "bucket_mib")
    last = 65535 - (engine.replicas - 1)
    need = (
        f"1024 to {last}: each of the {engine.replicas} replicas has its own port, from this one on"
    )
    need = need if engine.replicas > 1 else "1024 to 65535"
    port_ok = engine.sglang_port == 0 or 1024 <= engine.sglang_port <= last
    yield must(
        port_ok, "engine.sglang_port", engine.sglang_port, f"{need}; or 0 for free ones of the host"
    )
    yield from _router_checks(engine)
    file = engine.requirements_file
    need = "a path inside the repository, or 'rollouts:requirements/…'" + (
        ", or None" if isinstance(engine, Embedded) else ""
    )
    yield must(names_file(file), "engine.requirements_file", file, need)
    yield must(
        0 < engine.mem_fraction <= 1,
        "engine.mem_fraction",
        engine.mem_fraction,
        "0 < mem_fraction <= 1",
    )
    most = engine.max_total_tokens
    need = f"at least engine.context_length={engine.context_length}, or None: answers that do not fit are cut short"
    yield must(most is None or most >= engine.context_length, "engine.max_total_tokens", most, need)
    yield must(engine.restarts_max >= 0, "engine.restarts_max", engine.restarts_max, ">= 0")


def _router_checks(engine: EngineConfig) -> Checks:
    port, path, replicas = engine.router_port, "engine.router_port", engine.replicas
    if port is None:
        return
    hosts = len(engine.hosts or [0])
    yield must(
        replicas * hosts > 1,
        path,
        port,
        f"None, or more replicas: with replicas={replicas} there is nothing to route",
    )
    need = "None, or 0 among engine.hosts: the router runs on the first host, beside its engines"
    yield must(engine.hosts is None or 0 in engine.hosts, path, port, need)
    yield must(1024 <= port <= 65535, path, port, "1024 to 65535, or None for no router")
    first, last = engine.sglang_port, engine.sglang_port + replicas - 1
    yield must(
        first == 0 or not first <= port <= last,
        path,
        port,
        f"another port: {first} to {last} are the replicas'",
    )
    need = "None with engine.weight_sync=LoraSync: each replica has its own name for the adapter of a request"
    yield must(not isinstance(engine.weight_sync, LoraSync), path, port, need)


def engine_fits(config: Sections, engine: EngineConfig) -> Checks:
    """Check the engine's settings against this kind of device, and against what is asked of it."""
    device = config.target.device_type
    if device == "mps":
        ok = isinstance(engine, Embedded)
        yield must(ok, "engine", type(engine).__name__, "Embedded with target.device_type='mps'")
    if device == "cpu":
        size = engine.tensor_parallel_size
        yield must(
            size == 1, "engine.tensor_parallel_size", size, "1 with target.device_type='cpu'"
        )
        bounded = not isinstance(engine, SGLang) or engine.max_total_tokens is not None
        need = "a number for SGLang on a cpu, such as 65536: else the cache takes most of the host's memory"
        yield must(bounded, "engine.max_total_tokens", None, need)
    if isinstance(engine, VLLM) and config.rl is not None:
        need = "-1 with engine=VLLM, whose log-probs beside top_k are of the filtered distribution"
        yield must(config.rl.top_k == -1, "rl.top_k", config.rl.top_k, need)
    need = f"more than rl.max_new_tokens={config.rl.max_new_tokens if config.rl else 0}: the prompt counts too"
    room = config.rl is None or engine.context_length > config.rl.max_new_tokens
    yield must(room, "engine.context_length", engine.context_length, need)


def weight_sync_checks(config: Sections, engine: EngineConfig) -> Checks:
    """Check that the engine can be reached in the way that its weights are to come."""
    target, lag, sync = (
        config.target,
        config.rl.policy_lag_steps_max if config.rl else 0,
        engine.weight_sync,
    )
    far = [host for host in config.engine_hosts if host != 0]
    need = f"{'BroadcastSync or ' if isinstance(engine, SGLang) else ''}DiskSync with engine.hosts={engine.hosts}:"
    need = f"{need} no other host can read the first one's memory and files"
    sent = not isinstance(sync, TensorSync | LoraSync)
    yield must(sent or not far, "engine.weight_sync", sync, need)
    if isinstance(engine, SGLang) and isinstance(sync, LoraSync):
        yield from _adapter_checks(config, engine)
    ahead = engine.sleep_while_training and lag > 0
    need = f"False: with rl.ahead.policy_lag_steps_max={lag} the engine samples while the trainer steps"
    yield must(not ahead, "engine.sleep_while_training", engine.sleep_while_training, need)
    if target.device_type != "cuda":
        need = "False without target.device_type='cuda': there is no GPU to share"
        yield must(not engine.sleep_while_training, "engine.sleep_while_training", True, need)
        return
    named = bool(target.gpu_ranks) and target.gpu_ranks[0] in engine.gpu_ranks
    shared = named and 0 in config.engine_hosts
    where = f"target.gpu_ranks[0] {'is' if named else 'is not'} among engine.gpu_ranks={engine.gpu_ranks}"
    where += f" on other hosts: engine.hosts={engine.hosts}" if named and not shared else ""
    tensor = isinstance(sync, TensorSync)
    need = f"BroadcastSync or DiskSync: CUDA memory is shared on one GPU, and {where}"
    yield must(shared or not tensor, "engine.weight_sync", sync, need)
    single = engine.replicas == 1
    need = f"BroadcastSync or DiskSync with engine.replicas={engine.replicas}: CUDA memory is shared on one GPU, and"
    need = f"{need} only one replica has target.gpu_ranks[0]"
    yield must(single or not shared or not tensor, "engine.weight_sync", sync, need)
    grows = [name for name in ALLOCATOR_SETTINGS if grows_segments(config.host.env.get(name, ""))]
    need = "without expandable_segments:True for engine.weight_sync=TensorSync: such memory has no handles to share"
    for name in grows:
        yield must(not tensor, f"host.env[{name!r}]", config.host.env[name], need)
    need = f"TensorSync or DiskSync: NCCL wants a separate GPU for each side, and {where}"
    yield must(not shared or not isinstance(sync, BroadcastSync), "engine.weight_sync", sync, need)
    sleeps = engine.sleep_while_training
    need = f"False: there is memory to give back where a GPU is shared, and {where}"
    yield must(shared or not sleeps, "engine.sleep_while_training", sleeps, need)


def grows_segments(settings: str) -> bool:
    """Return whether these settings of torch's allocator make segments that can grow."""
    pairs = (part.partition(":") for part in settings.replace(" ", "").lower().split(","))
    return any(name == "expandable_segments" and value in ("true", "1") for name, _, value in pairs)


def _adapter_checks(config: Sections, engine: SGLang) -> Checks:
    """Check that adapters alone can be sent."""
    lora, rl = config.model.lora, config.rl
    need = (
        "DiskSync, TensorSync or BroadcastSync with model.lora=None: there are no adapters to send"
    )
    yield must(lora is not None, "engine.weight_sync", engine.weight_sync, need)
    if lora is not None and lora.target_modules != "all-linear":
        others = [
            name
            for name in lora.target_modules
            if name.rpartition(".")[2] not in SGLANG_LORA_TARGETS
        ]
        need = f"names that SGLang has adapters for ({', '.join(SGLANG_LORA_TARGETS)}), or weight_sync=DiskSync(...)"
        yield must(not others, "model.lora.target_modules", others, need)
    need = (
        "False with engine.weight_sync=LoraSync: a request keeps the adapter that it started with"
    )
    yield must(not (rl and rl.in_flight_updates), "rl.ahead.in_flight_updates", True, need)
    need = "False with engine.weight_sync=LoraSync: the engine's own weights, which are not sent again, would be lost"
    yield must(not engine.sleep_while_training, "engine.sleep_while_training", True, need)
