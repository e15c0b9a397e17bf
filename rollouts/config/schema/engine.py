"""The inference server of the RL stage, and how new weights reach it."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class DiskSync:
    """Weights are written as a checkpoint that the engine loads. docs/reference/engines.md."""

    kind: ClassVar[Literal["disk"]] = "disk"

    on_tmpfs: bool  # in memory (/dev/shm) of each host that has them


@dataclass(frozen=True, kw_only=True)
class TensorSync:
    """Weights go through shared memory, on a GPU without a copy through the host."""

    kind: ClassVar[Literal["tensor"]] = "tensor"
    on_tmpfs: ClassVar[bool] = False

    bucket_mib: int  # weights are sent in pieces of about this size


@dataclass(frozen=True, kw_only=True)
class BroadcastSync:
    """Weights go through a collective (NCCL, gloo) that trainer and engine share."""

    kind: ClassVar[Literal["broadcast"]] = "broadcast"
    on_tmpfs: ClassVar[bool] = False

    bucket_mib: int  # weights are sent in pieces of about this size


@dataclass(frozen=True, kw_only=True)
class LoraSync:
    """The adapters alone are written, and loaded beside the engine's own weights."""

    kind: ClassVar[Literal["lora"]] = "lora"

    on_tmpfs: bool  # in memory (/dev/shm), where trainer and engine share a host


@dataclass(frozen=True, kw_only=True)
class _Engine:
    hosts: list[int] | None  # of the job, those with engines; 0 is the first. None: the first alone
    gpu_ranks: list[int]  # of each such host; may equal target.gpu_ranks: colocated
    # of the first replica; the others follow it. 0: free ones, which the host chooses
    sglang_port: int
    replicas: int  # on each such host, each on tensor_parallel_size devices; all share the requests
    # of what is free on each device at the engine's start (vLLM: of the whole device)
    mem_fraction: float
    context_length: int  # tokens, prompt and answer together
    max_running_requests: int  # sequences decoded at once; more wait in line
    restarts_max: int  # how often in a run an engine that died or hangs is started again; 0: never


@dataclass(frozen=True, kw_only=True)
class Embedded(_Engine):
    """Our own server, on transformers' models. docs/reference/engines.md."""

    kind: ClassVar[Literal["embedded"]] = "embedded"
    tensor_parallel_size: ClassVar[int] = 1
    router_port: ClassVar[None] = None
    max_total_tokens: ClassVar[None] = None
    sleep_while_training: ClassVar[bool] = False

    # lock of the engine's own environment; None: it runs in the trainer's
    requirements_file: str | None
    weight_sync: DiskSync | TensorSync  # how new weights reach the engine


@dataclass(frozen=True, kw_only=True)
class SGLang(_Engine):
    """SGLang's server. docs/reference/engines.md."""

    kind: ClassVar[Literal["sglang"]] = "sglang"

    requirements_file: (
        str  # lock of the engine's own environment: a path, or "rollouts:requirements/…"
    )
    tensor_parallel_size: int  # devices that one replica is spread over
    # of SGLang's router, which deals out requests; None: the trainer does, in turn
    router_port: int | None
    # of the key-value cache; None: what mem_fraction leaves, less after a restart
    max_total_tokens: int | None
    # colocated on a GPU: the engine gives its memory back while the trainer steps
    sleep_while_training: bool
    # how new weights reach the engine
    weight_sync: DiskSync | TensorSync | BroadcastSync | LoraSync


@dataclass(frozen=True, kw_only=True)
class VLLM(_Engine):
    """vLLM's server. docs/reference/engines.md."""

    kind: ClassVar[Literal["vllm"]] = "vllm"
    router_port: ClassVar[None] = None
    max_total_tokens: ClassVar[None] = None
    sleep_while_training: ClassVar[bool] = False

    requirements_file: (
        str  # lock of the engine's own environment: a path, or "rollouts:requirements/…"
    )
    tensor_parallel_size: int  # devices that one replica is spread over
    weight_sync: DiskSync  # how new weights reach the engine


EngineConfig = Embedded | SGLang | VLLM
