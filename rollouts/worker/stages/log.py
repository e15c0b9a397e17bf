"""Where a stage's measurements go: files of the run directory, events, the trainer's window."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.run_dir import RunDir, append_event, append_jsonl, read_jsonl
from rollouts.training import distributed
from rollouts.training.alarms import Alarm, Alarms
from rollouts.training.evaluation import ALL_TASKS, Evaluation, answer_records
from rollouts.training.metrics import CompositeLogger, JSONLLogger, MetricsLogger
from rollouts.training.types import Prompt
from rollouts.worker.builders import StageName

logger = logging.getLogger("rollouts.trainer")


def logged_steps(config: Config, stage: StageName, steps: int) -> int:
    """Return how many of a stage's `steps` are logged: each `log_every`th and the last; all where nothing trains."""
    of_stage = config.sft if stage == "sft" else config.rl
    if of_stage is None or (
        config.rl is not None and stage == "rl" and config.rl.sampling.source == "engine_only"
    ):
        return steps
    return math.ceil(steps / of_stage.log_every)


def alarms_of(run: RunDir, logged: int) -> Alarms:
    """Return the alarms of a stage that logs `logged` steps; they know the evaluations of the stage before."""
    alarms = Alarms(logged)
    for row in read_jsonl(run.eval):
        if row["task"] == ALL_TASKS and row["value"] is not None:
            alarms.of_evaluation(
                f"{row['stage']} step {row['step']}", {row["metric"]: row["value"]}
            )
    return alarms


@dataclass(frozen=True)
class StageLog:
    """Writes what a stage measures into the run directory. Rank 0 alone calls it; `warn` does nothing elsewhere."""

    config: Config
    run: RunDir
    stage: StageName
    alarms: Alarms

    def warn(self, alarms: Sequence[Alarm], step: int) -> None:
        """Append a `warning` event for each alarm, on rank 0."""
        for alarm in alarms if distributed.rank() == 0 else ():
            append_event(
                self.run, "warning", stage=self.stage, step=step, **dataclasses.asdict(alarm)
            )

    def answers(self, stage: str, step: int, rows: Sequence[Prompt], found: Evaluation) -> None:
        """Append a line for each held-out row: its answer, and whether that is right. `stage` may be "base"."""
        records = ({"stage": stage, "step": step, **row} for row in answer_records(rows, found))
        append_jsonl(self.run.eval_samples, *records)

    def evaluation(self, stage: str, step: int, by_task: Mapping[str, Mapping[str, float]]) -> None:
        """Append a line for each metric of each task. `stage` may be "base"."""
        splits = "+".join(dict.fromkeys(spec.split for spec in self.config.data.eval_mixture))
        for task, metrics in by_task.items():
            for metric, value in metrics.items():
                row = {
                    "stage": stage,
                    "step": step,
                    "split": splits,
                    "task": task,
                    "metric": metric,
                    "value": value,
                }
                append_jsonl(self.run.eval, row)
                logger.info("eval %s", " ".join(f"{key}={value}" for key, value in row.items()))
        self.warn(
            self.alarms.of_evaluation(f"{stage} step {step}", by_task.get(ALL_TASKS, {})), step
        )

    def checkpoint(self, path: Path, step: int) -> None:
        """Append the event that a checkpoint is complete."""
        append_event(
            self.run,
            "checkpoint",
            stage=self.stage,
            step=step,
            path=str(path.relative_to(self.run.path)),
        )


class ConsoleLogger:
    """Prints one `key=value` line per logged step: what the trainer's window shows."""

    KEYS = (
        "loss",
        "reward_mean",
        "grad_norm",
        "lr",
        "entropy",
        "logp_diff_abs",
        "kl_reference",
        "groups_kept",
        "groups_zero_std_frac",
        "tokens_per_s",
        "mfu",
        "peak_memory_gib",
        "step_s",
    )

    def __init__(self, stage: StageName, num_steps: int) -> None:
        self._stage, self._num_steps = stage, num_steps

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        shown = " ".join(f"{key}={metrics[key]:.4g}" for key in self.KEYS if key in metrics)
        print(f"stage={self._stage} step={step}/{self._num_steps} {shown}", flush=True)

    def finish(self) -> None:
        """Do nothing: each line is printed at once."""


class AlarmLogger:
    """Checks every logged step for signs that nothing is learned."""

    def __init__(self, log: StageLog) -> None:
        self._log = log

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._log.warn(self._log.alarms.of_step(metrics), step)

    def finish(self) -> None:
        """Do nothing: each warning is written at once."""


@contextlib.contextmanager
def open_metrics(log: StageLog, num_steps: int) -> Iterator[MetricsLogger]:
    """Yield the logger of a stage's steps. Trackers are fed from its file, by a process of their own."""
    composite = CompositeLogger(
        [
            JSONLLogger(log.run.metrics, stage=log.stage),
            ConsoleLogger(log.stage, num_steps),
            AlarmLogger(log),
        ]
    )
    try:
        yield composite
    finally:
        composite.finish()
