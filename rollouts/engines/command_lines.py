"""Command lines of the inference servers, by the engine's kind. Pure, standard library only: a plan prints them.

Each kind has a `command` module: READY_PATH, `argv(server)`, `env(device_type, tree)` and `modules(device_type)`.
"""

import posixpath
from collections.abc import Mapping, Sequence
from types import ModuleType

from rollouts.config import EngineConfig, ModelConfig
from rollouts.engines.embedded import command as embedded
from rollouts.engines.send_model import START_NAME
from rollouts.engines.server_spec import DeviceType, ServerSpec
from rollouts.engines.sglang import command as sglang
from rollouts.engines.vllm import command as vllm

HOST = "127.0.0.1"  # loopback only: changing weights takes access to the host, and the run's key
# Where torch, gloo and NCCL listen; by default at the address of the host's name, or at all addresses.
LOOPBACK_ONLY = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torchrun's second store; the ranks' own is a file (distributed.py)
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "=lo",
    "VLLM_HOST_IP": "127.0.0.1",
}
COMMANDS: Mapping[str, ModuleType] = {"embedded": embedded, "sglang": sglang, "vllm": vllm}


def group_env(interface: str) -> dict[str, str]:
    """Return the variables by which ranks of several hosts listen on one interface alone, the private one."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def url_of(host: str, port: int) -> str:
    """Return the URL of a server, without a trailing slash; `host` may be an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def engine_url(engine: EngineConfig, replica: int = 0, *, host: str = HOST) -> str:
    """Return the URL of a replica, without a trailing slash."""
    return url_of(host, engine.sglang_port + replica)


def ready_url(engine: EngineConfig, replica: int = 0, *, host: str = HOST) -> str:
    """Return the URL that answers 200 once that replica serves; needs no key."""
    return f"{engine_url(engine, replica, host=host)}{COMMANDS[engine.kind].READY_PATH}"


def router_url(engine: EngineConfig) -> str | None:
    """Return the URL of the router in front of the replicas; None without one."""
    return None if engine.router_port is None else f"http://{HOST}:{engine.router_port}"


def router_ready_url(engine: EngineConfig) -> str:
    """Return the URL that answers 200 once the router has a replica to send requests to; needs no key."""
    return f"{router_url(engine)}{sglang.ROUTER_READY_PATH}"


def router_argv(
    engine: EngineConfig, urls: Sequence[str], *, python: str, request_timeout_s: float
) -> tuple[str, ...]:
    """Return the command line of the router of `urls`, in the engines' environment, from the repository's root."""
    assert engine.router_port is not None, "a config with a router"
    return (
        python,
        *sglang.router_argv(HOST, engine.router_port, urls, timeout_s=request_timeout_s),
    )


def sent_model_path(weights: str) -> str:
    """Return where a model lies that another host sent, for engines to start with; `weights`: the run's directory."""
    return posixpath.join(weights, START_NAME)


def receiver_ready_url(host: str, port: int) -> str:
    """Return the URL that answers 200 once weights for the engines of a host are taken there; needs no key."""
    return f"{url_of(host, port)}/ready"


def receiver_argv(
    python: str, host: str, port: int, *, weights: str, versions: str
) -> tuple[str, ...]:
    """Return the command line of what takes weights for a host's engines; any Python will do.

    The model that they start with goes below `weights`, and each version of the weights below `versions`.
    """
    return (
        *(python, "-m", "rollouts.engines.receive_model", "--host", host, "--port", str(port)),
        *("--start", sent_model_path(weights), "--versions", versions),
    )


def engine_argv(
    engine: EngineConfig,
    model: ModelConfig,
    *,
    python: str,
    model_path: str,
    device_type: DeviceType,
    seed: int,
    replica: int = 0,
    host: str = HOST,
) -> tuple[str, ...]:
    """Return the command line that serves `model_path` (a Hugging Face directory with weights) at `engine_url`.

    `python` is the interpreter of the engine's environment; run it from the repository's root, with the variables of
    `engine_env`. `seed` is for the sampling of requests without a seed. The caller chooses the device's index: it sets
    CUDA_VISIBLE_DEVICES to `engine_devices`.
    """
    server = ServerSpec(
        engine=engine,
        model=model,
        model_path=model_path,
        device_type=device_type,
        host=host,
        port=engine.sglang_port + replica,
        seed=seed + replica,
    )
    return (python, *COMMANDS[engine.kind].argv(server))


def engine_env(engine: EngineConfig, *, device_type: DeviceType, tree: str) -> dict[str, str]:
    """Return variables that the engine's process needs; `tree` is the repository's root on the host."""
    env: dict[str, str] = COMMANDS[engine.kind].env(device_type, tree)
    return env


def engine_modules(engine: EngineConfig, *, device_type: DeviceType) -> tuple[str, ...]:
    """Name the modules that a server needs from the engine's environment."""
    names: tuple[str, ...] = COMMANDS[engine.kind].modules(device_type)
    return names


def engine_devices(engine: EngineConfig, replica: int) -> list[int]:
    """Return the devices of one replica: `engine.gpu_ranks` in slices of `tensor_parallel_size`."""
    size = engine.tensor_parallel_size
    return engine.gpu_ranks[replica * size : (replica + 1) * size]
