"""What both stages of the trainer work with, and where what they measure goes: files, events, the window, W&B."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.config import Config
from rollouts.run_dir import RunDir, append_event, append_jsonl, iter_jsonl, read_jsonl
from rollouts.training.seams import Tokenizer

if TYPE_CHECKING:
    from rollouts.training.alarms import Alarm, Alarms
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.evaluation import Evaluation
    from rollouts.training.metrics import MetricsLogger, WandbLogger
    from rollouts.training.types import Prompt

logger = logging.getLogger("rollouts.trainer")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def logged_steps(config: Config, stage: str, steps: int) -> int:
    """How many of a stage's `steps` are logged: each `log_every`th, and the last; all where nothing is trained."""
    of_stage = config.sft if stage == "sft" else config.rl
    if of_stage is None or (config.rl is not None and stage == "rl" and config.rl.sampling.source == "engine_only"):
        return steps
    return math.ceil(steps / of_stage.log_every)


def alarms_of(run: RunDir, logged: int) -> "Alarms":
    """The alarms of a stage that logs `logged` steps, which know what the stage before has evaluated to."""
    from rollouts.training.alarms import Alarms
    from rollouts.training.evaluation import ALL_TASKS

    alarms = Alarms(logged)
    for row in read_jsonl(run.eval):
        if row["task"] == ALL_TASKS and row["value"] is not None:
            alarms.of_evaluation(f"{row['stage']} step {row['step']}", {row["metric"]: row["value"]})
    return alarms


@dataclass(frozen=True)
class Job:
    """What both stages work with."""

    config: Config
    run: RunDir
    stage: str
    tokenizer: Tokenizer
    backend: "PyTorchTrainingBackend | None"  # None where nothing is trained
    num_steps: int
    resume: Mapping[str, Any] | None  # what load_checkpoint returned, when this stage goes on from its own checkpoint
    pad_token_id: int
    alarms: "Alarms"

    def warn(self, alarms: Sequence["Alarm"], step: int) -> None:
        """A `warning` event for each, on rank 0."""
        for alarm in alarms if rank() == 0 else ():
            append_event(self.run, "warning", stage=self.stage, step=step, **dataclasses.asdict(alarm))

    def log_answers(self, stage: str, step: int, rows: Sequence["Prompt"], found: "Evaluation") -> None:
        """A row for each held-out row: what was answered, and whether it is right."""
        from rollouts.training.evaluation import answer_records

        append_jsonl(
            self.run.eval_samples, *({"stage": stage, "step": step, **row} for row in answer_records(rows, found))
        )

    def log_eval(self, stage: str, step: int, by_task: Mapping[str, Mapping[str, float]]) -> None:
        """A row for each metric of each task."""
        from rollouts.training.evaluation import ALL_TASKS

        splits = "+".join(dict.fromkeys(spec.split for spec in self.config.data.eval_mixture))
        for task, metrics in by_task.items():
            for metric, value in metrics.items():
                row = {"stage": stage, "step": step, "split": splits, "task": task, "metric": metric, "value": value}
                append_jsonl(self.run.eval, row)
                logger.info("eval %s", " ".join(f"{key}={value}" for key, value in row.items()))
        self.warn(self.alarms.of_evaluation(f"{stage} step {step}", by_task.get(ALL_TASKS, {})), step)

    def on_checkpoint(self, path: Path, step: int) -> None:
        append_event(self.run, "checkpoint", stage=self.stage, step=step, path=str(path.relative_to(self.run.path)))

    @property
    def first_step(self) -> int:
        return self.resume["step"] if self.resume else 0


class _ConsoleLogger:
    """One `key=value` line per logged step: what the trainer's window shows."""

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

    def __init__(self, stage: str, num_steps: int) -> None:
        self._stage, self._num_steps = stage, num_steps

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        shown = " ".join(f"{key}={metrics[key]:.4g}" for key in self.KEYS if key in metrics)
        print(f"stage={self._stage} step={step}/{self._num_steps} {shown}", flush=True)

    def finish(self) -> None:
        """Nothing is pending."""


class _WandbSamples:
    """Gives W&B samples and answers as tables: where an evaluation fell on the step, and of the last step."""

    def __init__(self, wandb: "WandbLogger", job: Job) -> None:
        self._wandb, self._job, self._step, self._shown = wandb, job, 0, 0

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._step = step
        if any(key.startswith("eval_") for key in metrics):
            self._show()

    def _show(self) -> None:
        """Samples are written before their step is logged, answers before it is over."""
        run, here = self._job.run, dict[str, Any](step=self._step)
        tables = {
            "samples": (run.rollouts, here, ("prompt", "response", "reward", "advantage")),
            "eval_samples": (
                run.eval_samples,
                {**here, "stage": self._job.stage},
                ("row", "task", "answer", "correct"),
            ),
        }
        for name, (path, wanted, shown) in tables.items():
            rows = [row for row in iter_jsonl(path) if all(row.get(key) == value for key, value in wanted.items())]
            if self._job.stage == "rl" or name == "eval_samples":
                self._wandb.log_table(name, [{key: row.get(key) for key in shown} for row in rows], self._step)
        self._shown = self._step

    def finish(self) -> None:
        if self._shown < self._step:
            self._show()


class _AlarmLogger:
    """Looks at every logged step for what shows that nothing is learned."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._job.warn(self._job.alarms.of_step(metrics), step)

    def finish(self) -> None:
        """Nothing is pending."""


@contextlib.contextmanager
def metrics_of(job: Job) -> Iterator["MetricsLogger"]:
    from rollouts.training.metrics import CompositeLogger, JSONLLogger, WandbLogger

    output = job.config.output
    loggers: list[MetricsLogger] = [
        JSONLLogger(job.run.metrics, stage=job.stage),
        _ConsoleLogger(job.stage, job.num_steps),
        _AlarmLogger(job),
    ]
    wandb: WandbLogger | None = None
    if output.use_wandb and rank() == 0:
        name = f"{job.run.run_id}-{job.stage}"
        wandb = WandbLogger(
            project=output.wandb_project,
            name=name,
            config=job.config.to_json(),
            group=output.experiment_name,
            directory=job.run.path,
        )
        loggers += [_WandbSamples(wandb, job), wandb]  # the tables before the run is finished
    composite = CompositeLogger(loggers)
    try:
        yield composite
    except BaseException:
        if wandb is not None:
            wandb.fail()
        raise
    finally:
        composite.finish()
