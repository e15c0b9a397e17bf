"""A server to start, as every engine's command line needs it. Pure, standard library only."""

from dataclasses import dataclass
from typing import Literal

from rollouts.config import EngineConfig, ModelConfig

DeviceType = Literal["cuda", "cpu", "mps"]


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """One inference server to start: what it serves, on which kind of device, and where it listens."""

    engine: EngineConfig
    model: ModelConfig
    model_path: str  # a Hugging Face directory with weights, or a hub id
    device_type: DeviceType  # its index comes from CUDA_VISIBLE_DEVICES
    host: str
    port: int
    seed: int  # for the sampling of requests without a seed
