"""Speed, from a step's tokens and seconds, and the most memory that the process has needed so far."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rollouts.training import distributed
from rollouts.training.flops import attended_length, flops_per_token, peak_flops
from rollouts.training.seams import TrainingBackend

GIB = 2**30


@dataclass(frozen=True)
class Throughput:
    """The device and model that a run trains on. `config` is None if the model's FLOPs are unknown, `peak` likewise."""

    device: torch.device
    config: Any | None  # a transformers config
    peak: float | None  # FLOP/s of one rank's device, in the dtype that it trains in

    @classmethod
    def of_backend(cls, backend: TrainingBackend, peak: float | None = None) -> "Throughput":
        """Return the throughput of a backend. `peak` None: what the maker states for the card, where listed."""
        device = backend.device
        if peak is None and device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device))
        config = getattr(backend.model, "config", None)
        try:
            flops_per_token(config, 1)
        except (ValueError, AttributeError):
            # an architecture that cannot be counted, or no transformers model
            config = None
        return cls(device, config, peak)

    def metrics(
        self,
        lengths: Sequence[int],
        trained_tokens: float,
        *,
        train_s: float,
        step_s: float,
        passes: int = 1,
    ) -> dict[str, float]:
        """Return the rates of a step over documents of `lengths` tokens, memory, and "mfu" where it is known.

        `passes` is how often each token went forward and backward within `train_s`. The numbers are all ranks';
        the memory is this rank's. docs/reference/metrics.md has them all.
        """
        tokens = sum(lengths)
        found = {
            "trained_tokens": trained_tokens,
            "tokens_per_s": tokens / step_s,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        if self.peak is not None and self.config is not None:
            share = trained_tokens / tokens
            flops = (
                flops_per_token(self.config, attended_length(lengths), head_share=share)
                * tokens
                * passes
            )
            found["mfu"] = flops / (train_s * self.peak * distributed.world_size())
        return found


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that tensors have held on a CUDA device; elsewhere, that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
