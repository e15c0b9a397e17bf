"""The inference server of the RL stage."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The inference server of the RL stage."""

    kind: Literal["embedded", "sglang", "vllm"]
    requirements_file: str | None  # lock of the engine's own environment; None: it runs in the trainer's (embedded)
    gpu_ranks: list[int]  # may equal target.gpu_ranks: colocated
    sglang_port: int  # of the first replica; the others follow it
    replicas: int  # copies that share the requests, each on tensor_parallel_size devices
    router_port: int | None  # of SGLang's router, through which they get them; None: the trainer deals them out in turn
    tensor_parallel_size: int
    mem_fraction: float  # of what is free on each device at the engine's start (vLLM: of the whole device)
    context_length: int  # tokens, prompt and answer together
    max_total_tokens: (
        int  # of the key-value cache; -1: what mem_fraction leaves, less for a colocated engine started again
    )
    max_running_requests: int  # sequences decoded at once; more wait in line
    weight_sync: Literal["disk", "tensor", "broadcast", "lora"]  # how new weights get there: docs/engines.md
    weight_sync_bucket_mib: int  # tensor, broadcast: weights are sent in pieces of about this size
    weights_on_tmpfs: bool  # disk, lora: in memory (/dev/shm), where trainer and engine share a host
    sleep_while_training: bool  # colocated on a GPU: the engine gives its memory back while the trainer steps
    restarts_max: int  # how often in a run an engine that died or hangs is started again; 0: never
