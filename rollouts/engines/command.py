"""What every engine's command line is made of. Pure, standard library only."""

from dataclasses import dataclass
from typing import Literal

from rollouts.config import EngineConfig, ModelConfig

DeviceType = Literal["cuda", "cpu", "mps"]


@dataclass(frozen=True, kw_only=True)
class Server:
    """One inference server to start: what it serves, on which kind of device, and where it listens."""

    engine: EngineConfig
    model: ModelConfig
    model_path: str  # a Hugging Face directory with weights, or a hub id
    device_type: DeviceType  # its index comes from CUDA_VISIBLE_DEVICES
    host: str
    port: int
    seed: int  # of the sampling of requests that bring none of their own
