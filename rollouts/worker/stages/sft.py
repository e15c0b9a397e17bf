"""The sft stage: train on examples, with the validation loss and answers to held-out rows before and after."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from rollouts.config import Config, SFTConfig
from rollouts.run_dir import RunDir
from rollouts.training import distributed
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.evaluation import ALL_TASKS
from rollouts.training.loops import validation_losses
from rollouts.training.loops.after_step import Hooks
from rollouts.training.loops.sft_loop import SFTSteps, run_sft
from rollouts.training.types import Prompt, SFTTrainingConfig
from rollouts.worker.builders import EngineUrls
from rollouts.worker.builders.data import StageData, sft_seed
from rollouts.worker.stages.held_out import answers_in_process, rows_in_process
from rollouts.worker.stages.log import open_metrics
from rollouts.worker.stages.mistakes import MISTAKES
from rollouts.worker.stages.parts import StageParts, open_parts
from rollouts.worker.stages.stop_request import heeding_stop

__all__ = ["MISTAKES", "SFTStage", "build"]


@contextlib.asynccontextmanager
async def build(config: Config, run: RunDir, urls: EngineUrls) -> AsyncIterator["SFTStage"]:
    """Yield the stage with its model and data loaded. It samples nothing from `urls`."""
    async with open_parts(config, run, "sft") as (parts, data):
        assert config.sft is not None and parts.backend is not None, (
            "the plan starts sft where the config has it"
        )
        yield SFTStage(
            parts, data, config.sft, parts.backend, rows_in_process(parts, data.eval_rows)
        )


@dataclass(frozen=True)
class SFTStage:
    parts: StageParts
    data: StageData
    sft: SFTConfig
    backend: PyTorchTrainingBackend
    rows: Sequence[Prompt]  # held-out ones that are answered

    async def run(self) -> None:
        parts, sft, evaluates = self.parts, self.sft, bool(self.data.eval_samples)
        if evaluates and not parts.resume:
            await self._evaluate(0, stage="base")
            self._answer(0, stage="base")
        config = SFTTrainingConfig(
            num_steps=parts.num_steps,
            batch_size=sft.target_examples_per_step,
            log_every=sft.log_every,
            checkpoint_every=sft.checkpoint_every,
            micro_batch_size=sft.batch_size,
            micro_batch_tokens=None if sft.micro_batch_tokens == -1 else sft.micro_batch_tokens,
        )
        steps = SFTSteps(config, sft_seed(parts.config), parts.pad_token_id, parts.resume)
        with open_metrics(parts.log, parts.num_steps) as metrics_logger:
            with heeding_stop(parts.run) as stop:
                hooks = Hooks(
                    log=metrics_logger,
                    evaluate=self._evaluate if evaluates else None,
                    eval_every=sft.eval_every,
                    on_checkpoint=parts.log.checkpoint,
                    stop=stop,
                )
                await run_sft(self.backend, self.data.sft, steps, hooks)
            if not stop.ended_the_steps():
                self._answer(parts.num_steps)

    async def _evaluate(self, step: int, stage: str = "sft") -> dict[str, float]:
        """Return the validation loss: over all held-out rows before the first step and after the last."""
        whole = step in (0, self.parts.num_steps)
        losses = await validation_losses(
            self.backend,
            self.data.eval_samples,
            batch_size=self.sft.batch_size,
            batches_max=-1 if whole else self.sft.eval_steps,
            pad_token_id=self.parts.pad_token_id,
        )
        if distributed.rank() == 0:
            by_task = {task: {"validation_loss": found["loss"]} for task, found in losses.items()}
            self.parts.log.evaluation(stage, step, by_task)
        distributed.barrier()
        return {"validation_loss": losses[ALL_TASKS]["loss"]}

    def _answer(self, step: int, stage: str = "sft") -> None:
        """Answer held-out rows: before the first step, and after the last once its checkpoint is written."""
        parts = self.parts
        if (
            self.data.eval_samples
            and self.rows
            and (distributed.rank() == 0 or self.backend.collective)
        ):
            # where the model is sharded, all ranks or none
            found = answers_in_process(parts, self.rows)
            if distributed.rank() == 0:
                parts.log.answers(stage, step, self.rows, found)
                parts.log.evaluation(stage, step, found.metrics(parts.config.eval.pass_at))
        distributed.barrier()
