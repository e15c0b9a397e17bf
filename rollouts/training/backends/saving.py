"""Saves a training state in the background: a snapshot in turn with other work, then files by a thread of its own."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rollouts.training import checkpoint, distributed, optimizer_state
from rollouts.training.backends.futures import ThreadFuture, Worker
from rollouts.training.backends.trained import Trained
from rollouts.training.checkpoint import Retention
from rollouts.training.devices import set_current
from rollouts.training.model_files import write_weights
from rollouts.training.random_state import rng_state
from rollouts.training.seams import Tokenizer
from rollouts.training.whole_tensors import whole_adapter, whole_weights


class Saver:
    """Writes checkpoints below `checkpoint_dir`, one at a time; the process does not exit before the last is written.

    `resumed_from` is a checkpoint that always stays.
    """

    def __init__(
        self,
        trained: Trained,
        checkpoint_dir: Path,
        tokenizer: Tokenizer | None,
        retention: Retention | None,
    ) -> None:
        self.checkpoint_dir = checkpoint_dir
        # the writer's own: a fast tokenizer serves one thread at a time
        self.tokenizer = copy.deepcopy(tokenizer)
        self.resumed_from: Path | None = None
        self._trained = trained
        self._retention = retention or Retention()
        self._writer = ThreadPoolExecutor(  # exit waits for it
            1, "checkpoint-writer", initializer=set_current, initargs=(trained.device,)
        )
        self._group = distributed.new_group()
        self._staging = optimizer_state.Staging()
        self._saving: ThreadFuture[Path] | None = None

    async def start(
        self, worker: Worker, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None
    ) -> ThreadFuture[Path]:
        """Return once the state is copied, by `worker`; the future waits until it is complete on disk, on every rank.

        Raises TypeError where `extra` is not plain data: here, not when a resume depends on it.
        """
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"extra of the checkpoint of step {step}: needs plain data: {error}"
            ) from error
        what = (step, dict(metrics), copy.deepcopy(extra or {}), self._saving)
        staged = worker.submit("save_checkpoint", self._snapshot, *what)
        self._saving = saving = ThreadFuture(self._writer.submit(self._write, staged))
        await staged.result()
        return saving

    def close(self) -> None:
        """Wait for the checkpoint that is being written, if any, however it ends."""
        if self._saving is not None:
            self._saving.wait_done()

    def save_weights(self, path: Path, dtype: torch.dtype | None) -> Path:
        """Write weights and config to the directory `path`; rank 0 writes. In turn with other work."""
        model = self._trained.model
        self._trained.placement.at_rest(model)
        weights = whole_weights(model, copy=False, dtype=dtype)
        return distributed.on_rank_0(lambda: write_weights(model, path, weights))

    def _snapshot(
        self,
        step: int,
        metrics: dict[str, Any],
        extra: dict[str, Any],
        before: ThreadFuture[Path] | None,
    ) -> checkpoint.Snapshot:
        trained = self._trained
        trained.placement.at_rest(trained.model)
        if before is not None:
            before.wait()  # one copy in memory at a time; and a save that failed ends the run, seen or not
        tensors, plain = optimizer_state.collect(trained.model, trained.optimizer)
        rng = distributed.gather_objects(rng_state(trained.device))
        own_part = trained.placement.collective or distributed.rank() == 0
        value = (
            {"value_head": copy.deepcopy(trained.value_head.state())} if trained.value_head else {}
        )
        return checkpoint.Snapshot(
            step=step,
            weights=whole_weights(trained.model, copy=True),
            adapter=whole_adapter(trained.model),
            optimizer=self._staging.copy(tensors) if own_part else {},
            training_state={
                "optimizer": plain,
                "optimizer_steps": trained.step,
                "rng": rng,
                "extra": extra,
                **value,
            },
            metadata={
                "metrics": metrics,
                "world_size": distributed.world_size(),
                **({"reference": trained.reference.record} if trained.reference else {}),
            },
        )

    def _write(self, staged: ThreadFuture[checkpoint.Snapshot]) -> Path:
        """Write it, on the writer's thread."""
        return checkpoint.write_checkpoint(
            self.checkpoint_dir,
            staged.wait(),
            model=self._trained.model,
            tokenizer=self.tokenizer,
            retention=self._retention,
            protected=[self.resumed_from] if self.resumed_from else [],
            group=self._group,
        )
