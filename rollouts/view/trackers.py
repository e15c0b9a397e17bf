"""Experiment trackers that a run can be copied into: W&B, Trackio, MLflow, TensorBoard.

Each stage of a run is a run there, `<run_id>-sft` and `<run_id>-rl`, with the names of metrics.jsonl. Their packages
are imported only here, and only the one that is asked for.
"""

import json
import os
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = Mapping[str, Any]
PARAM_CHARS_MAX = 500  # of a value that MLflow takes
TRACKERS = ("wandb", "trackio", "mlflow", "tensorboard")  # extras of pyproject.toml, too
WANDB_URL = "https://api.wandb.ai"


@dataclass(frozen=True, kw_only=True)
class TrackedStage:
    """What a tracker is told of one stage of a run before its numbers."""

    project: str
    group: str  # the experiment's name: it joins the stages, and the runs that go on from one
    name: str  # <run_id>-<stage>
    run_key: str  # the same whenever this stage is opened again, and no other's
    config: Mapping[str, Any]
    directory: Path  # for files of the tracker's own


class Tracker(Protocol):
    """One stage of a run, open in a tracker. What it raises is the tracker's own."""

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step; steps increase."""
        ...

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Record rows of text and numbers, all of the same keys."""
        ...

    def flush(self) -> None:
        """Return once what was logged outlives this process, where the tracker has a way to say so."""
        ...

    def close(self, *, failed: bool) -> None:
        """Hand on what is pending, and end; `failed` is how the run is called there."""
        ...


def open_tracker(kind: str, stage: TrackedStage) -> Tracker:
    """Open a stage in a tracker. Raises ModuleNotFoundError where its package is missing."""
    openers: dict[str, Callable[[TrackedStage], Tracker]] = {
        "wandb": _Wandb,
        "trackio": _Trackio,
        "mlflow": _Mlflow,
        "tensorboard": _TensorBoard,
    }
    return openers[kind](stage)


def place_of(kind: str, directory: Path) -> str:
    """Return where a tracker keeps what it gets from this machine."""
    here = os.uname().nodename
    if kind == "wandb":
        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        return f"files of {here}" if offline else os.environ.get("WANDB_BASE_URL") or WANDB_URL
    if kind == "mlflow":
        uri = urllib.parse.urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
        return uri.geturl() if uri.scheme not in ("", "file") else f"{here}:{uri.path or directory}"
    named = os.environ.get("TRACKIO_DIR") if kind == "trackio" else None
    return f"{here}:{named or directory}"


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return the rows as columns of one type each: text where values differ in type, or are neither text nor number."""
    found: dict[str, list[Any]] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        plain = all(isinstance(value, float | int) for value in values)
        found[name] = values if plain else [_text(value) for value in values]
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a config's fields by their paths (`rl.loss.kind`), as text."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _text(value)[:PARAM_CHARS_MAX]
    return found


class _Wandb:
    def __init__(self, stage: TrackedStage) -> None:
        import wandb

        stage.directory.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=stage.project,
            group=stage.group,
            name=stage.name,
            id=stage.run_key,
            resume="allow",
            config=dict(stage.config),
            dir=str(stage.directory),
            # what this machine does, and where it stands, is not the run's
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step}, step=step)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        found = columns(rows)
        data = [list(row) for row in zip(*found.values(), strict=True)]
        self._run.log({name: self._wandb.Table(columns=list(found), data=data)}, step=step)

    def flush(self) -> None:
        """Do nothing: W&B's own process has it by now."""

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _Trackio:
    def __init__(self, stage: TrackedStage) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=stage.project,
            group=stage.group,
            name=stage.name,
            resume="allow",
            config=dict(stage.config),
            embed=False,
            auto_log_gpu=False,  # this machine's are not the run's
            auto_log_cpu=False,
        )

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        import pandas

        self._trackio.log(
            {name: self._trackio.Table(dataframe=pandas.DataFrame(columns(rows)))}, step=step
        )

    def flush(self) -> None:
        """Do nothing: it has no such call."""

    def close(self, *, failed: bool) -> None:
        self._trackio.finish()


class _Mlflow:
    def __init__(self, stage: TrackedStage) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            stage.directory.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # a database needs more packages
            mlflow.set_tracking_uri(stage.directory.as_uri())
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(stage.project)
        known = self._client.search_runs(
            [experiment.experiment_id], f"tags.rollouts_key = '{stage.run_key}'", max_results=1
        )
        if known:
            self._run_id = known[0].info.run_id
            return
        tags = {"rollouts_key": stage.run_key, "group": stage.group}
        made = self._client.create_run(experiment.experiment_id, run_name=stage.name, tags=tags)
        self._run_id = made.info.run_id
        params = [mlflow.entities.Param(key, value) for key, value in flat(stage.config).items()]
        for begin in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[begin : begin + 100])

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at_ms = int(time_s * 1000)
        metrics = [Metric(name, value, at_ms, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        self._client.log_text(self._run_id, text, f"{name}/step_{step:06d}.jsonl")

    def flush(self) -> None:
        """Do nothing: each call wrote what it had."""

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


class _TensorBoard:
    def __init__(self, stage: TrackedStage) -> None:
        import tensorboardX

        place = stage.directory / stage.project / stage.name
        is_new = not place.exists()
        # a file of its own: tensorboardX names them by the second, and writes over one of the same
        self._writer = tensorboardX.SummaryWriter(str(place), filename_suffix=f".{time.time_ns()}")
        if is_new:
            lines = [f"    {name} = {value}" for name, value in flat(stage.config).items()]
            self._writer.add_text("config", "\n".join(lines))

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=time_s)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        # indented: a block of code, whose text is shown as it is
        lines = [f"    {_text(dict(row))}" for row in rows]
        self._writer.add_text(name, "\n".join(lines), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()
