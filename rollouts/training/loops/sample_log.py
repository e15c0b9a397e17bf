"""The record of a step's samples, written once they were trained on: with the trainer's log-probs.

B sequences, T tokens.
"""

import itertools
from dataclasses import dataclass

import anyio.to_thread
import torch
from torch import Tensor

from rollouts.training import distributed
from rollouts.training.loops.batching import dealt_rows
from rollouts.training.loops.rollout_metrics import log_samples
from rollouts.training.metrics import MetricsLogger
from rollouts.training.seams import Batch, TrainingBackend
from rollouts.training.types import RLTrainingConfig, RolloutBatch


@dataclass(frozen=True)
class SampleLog:
    """Where a step's samples are recorded, on rank 0; elsewhere, or without a logger, nothing is written."""

    logger: MetricsLogger | None
    samples: RolloutBatch | None
    batch: Batch  # of the whole step
    step: int

    def write(self, trainer: Tensor | None = None) -> None:
        """Record every sample, with all that training on it again needs, and the trainer's log-probs [B, T]."""
        if self.logger is None or self.samples is None:
            return
        advantages = self.batch["advantages"].tolist() if "advantages" in self.batch else None
        temperature = self.batch["temperature"]
        log_samples(self.logger, self.samples, advantages, self.step, temperature, trainer=trainer)


async def trainer_log_probs(
    backend: TrainingBackend, batch: Batch, config: RLTrainingConfig
) -> Tensor | None:
    """Return the trained tokens' log-probs [B, T] as the last update's loss had them; not a number elsewhere.

    None where the sampler's are unknown. No pass is made for them. Every rank makes the call, after the update.
    """
    if "old_log_probs" not in batch:
        return None
    found = await backend.trained_log_probs().result()
    rows = dealt_rows(
        batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    own = list(zip(rows, found, strict=False))  # blank micro-batches come last, and have no rows
    parts = [own]
    if distributed.world_size() > 1:  # in a thread: rank 0's event loop continues to generate
        parts = await anyio.to_thread.run_sync(distributed.gather_objects, own)
    whole = torch.full_like(batch["loss_mask"], torch.nan)
    for chosen, log_probs in itertools.chain(*parts):
        whole[chosen, : log_probs.shape[1]] = log_probs.to(whole.dtype)
    trained = batch["loss_mask"] != 0
    trained[:, 0] = False  # predicted by nothing
    return torch.where(trained, whole, torch.nan)
