"""The rl stage: train on what the engines sample, or on saved rollouts; or sample and score alone."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rollouts.config import Config, RLConfig
from rollouts.run_dir import RunDir
from rollouts.training import distributed
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.loops import collect_rollouts
from rollouts.training.loops.after_step import EvalFn, Hooks
from rollouts.training.loops.rl_loop import RLSteps, run_rl
from rollouts.training.loops.rollout_batch import BatchOptions
from rollouts.training.metrics import JSONLLogger, MetricsLogger
from rollouts.training.replay import ReplayRollouts
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.rollout_stream import open_rollouts
from rollouts.training.types import RewardFn
from rollouts.training.weights.publish import WeightPublisher
from rollouts.worker.builders import EngineUrls
from rollouts.worker.builders.data import StageData
from rollouts.worker.builders.engines import open_pool
from rollouts.worker.builders.loss import batch_clip_range, rl_training_config
from rollouts.worker.builders.reward import open_reward
from rollouts.worker.builders.rollout_source import build_rollout_manager
from rollouts.worker.builders.weights import open_publisher
from rollouts.worker.stages.held_out import rl_evaluation
from rollouts.worker.stages.log import open_metrics
from rollouts.worker.stages.mistakes import MISTAKES
from rollouts.worker.stages.parts import StageParts, open_parts
from rollouts.worker.stages.stop_request import heeding_stop

__all__ = ["MISTAKES", "RLStage", "build"]


@contextlib.asynccontextmanager
async def build(config: Config, run: RunDir, urls: EngineUrls) -> AsyncIterator["RLStage"]:
    """Yield the stage with its model and data loaded; it connects to the engines when it runs."""
    async with open_parts(config, run, "rl") as (parts, data):
        assert config.rl is not None, "the plan starts rl where the config has it"
        yield RLStage(parts, data, config.rl, urls)


@dataclass(frozen=True)
class RLStage:
    parts: StageParts
    data: StageData
    rl: RLConfig
    urls: EngineUrls

    async def run(self) -> None:
        parts, config = self.parts, self.parts.config
        async with open_pool(config, parts.run, self.urls) as pool:
            with open_reward(config) as reward_fn:
                source = self._rollout_source(pool, reward_fn)
                evaluate = rl_evaluation(parts, self.rl, self.data.eval_rows, pool, reward_fn)
                with open_metrics(parts.log, parts.num_steps) as metrics_logger:
                    if parts.backend is not None:
                        async with open_publisher(
                            config, parts.run, parts.backend, pool, self.urls.receivers
                        ) as publisher:
                            await self._train(
                                parts.backend,
                                source=source,
                                pool=pool,
                                publisher=publisher,
                                metrics_logger=metrics_logger,
                                evaluate=evaluate,
                            )
                    elif source is not None:
                        await self._collect(source, metrics_logger, evaluate)

    def _rollout_source(
        self, pool: EnginePool, reward_fn: RewardFn | None
    ) -> AsyncRolloutManager | ReplayRollouts | None:
        """Return where batches come from, on rank 0, which hands them to the other ranks."""
        if distributed.rank() != 0:
            return None
        if self.data.saved is not None:
            return self.data.saved
        return build_rollout_manager(
            self.rl, self.data.prompts, self.parts.tokenizer, pool, reward_fn
        )

    async def _train(
        self,
        backend: PyTorchTrainingBackend,
        *,
        source: AsyncRolloutManager | ReplayRollouts | None,
        pool: EnginePool,
        publisher: WeightPublisher | None,
        metrics_logger: MetricsLogger,
        evaluate: EvalFn | None,
    ) -> None:
        parts, rl = self.parts, self.rl
        config = rl_training_config(rl, parts.num_steps)
        batches = BatchOptions(parts.pad_token_id, rl.temperature, batch_clip_range(rl))
        async with open_rollouts(source, config, pool) as rollouts:
            with heeding_stop(parts.run) as stop:
                hooks = Hooks(
                    log=metrics_logger,
                    log_samples=JSONLLogger(parts.run.rollouts)
                    if isinstance(source, AsyncRolloutManager)
                    else None,
                    evaluate=evaluate,
                    eval_every=rl.eval_every,
                    on_checkpoint=parts.log.checkpoint,
                    stop=stop,
                )
                await run_rl(
                    backend, rollouts, publisher, RLSteps(config, batches, parts.resume), hooks
                )

    async def _collect(
        self,
        source: AsyncRolloutManager | ReplayRollouts,
        metrics_logger: MetricsLogger,
        evaluate: EvalFn | None,
    ) -> None:
        """Sample and score with the model as it is; on rank 0."""
        await collect_rollouts(
            source,
            self.parts.num_steps,
            JSONLLogger(self.parts.run.rollouts),
            temperature=self.rl.temperature,
            metrics_logger=metrics_logger,
            eval_fn=evaluate,
        )
