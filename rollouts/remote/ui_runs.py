"""The runs of this machine for the page of `deploy ui`: its registry, and directories that were named."""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollouts.remote.errors import DeployError
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.list_runs import Wanted, row_here, rows_here
from rollouts.remote.report_verbs import ReadRun, config_of, difference_of, seed_groups
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen, list_row
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import FINAL_STATES, RunDir, last_step, observe, valid_run_id
from rollouts.view.charts import RunGroup
from rollouts.view.run_data import NotARunError, RunData, read_run
from rollouts.view.run_report import ConfigDifference
from rollouts.view.ui.run_source import PageError, RunList

KEPT_S = 1.0  # a list is read again after that


class Compared:
    """How runs are put together and told apart: by the configs that lie in their directories."""

    def grouped(self, runs: Sequence[RunData]) -> list[RunGroup]:
        """Put runs together that differ in their seeds alone."""
        return seed_groups([ReadRun(run, config_of(run.path)) for run in runs])

    def difference(self, first: RunData, second: RunData) -> ConfigDifference:
        """Return where the configs and the code of two runs differ."""
        sides = [ReadRun(run, config_of(run.path)) for run in (first, second)]
        return difference_of(*sides)


class KnownRuns(Compared):
    """The registry's runs, and run directories from elsewhere. Of a run of this machine its own files are read."""

    title = "this machine"

    def __init__(self, directories: Sequence[Path] = ()) -> None:
        """Raises DeployError for a directory that is not a run, or that has no name of its own."""
        self._named: dict[str, Path] = {}
        for path in directories:
            _check(path, self._named)
            self._named[path.resolve().name] = path.resolve()
        self._lock = threading.Lock()
        self._list, self._listed_at = RunList([], []), 0.0

    def runs(self) -> RunList:
        """Return all runs, newest first."""
        with self._lock:
            if time.monotonic() - self._listed_at > KEPT_S or not self._listed_at:
                rows, damaged = rows_here(Wanted())
                remarks = [f"{file} cannot be read, and is left out" for file in damaged]
                known = {row["run_id"] for row in rows}
                own = [_row(path) for name, path in self._named.items() if name not in known]
                self._list, self._listed_at = (
                    RunList([*own, *reversed(rows)], remarks),
                    time.monotonic(),
                )
            return self._list

    def row(self, run_id: str) -> Mapping[str, Any] | None:
        """Return one run as it is at this moment."""
        if run_id in self._named:
            return _row(self._named[run_id])
        with contextlib.suppress(DeployError):
            return row_here(run_id)
        return None

    def directory(self, run_id: str) -> Path:
        """Return where a run's files lie. Raises PageError."""
        if run_id in self._named:
            return self._named[run_id]
        entry = _entry(run_id)
        if entry.target == LOCAL_TARGET and RunDir(Path(entry.run_path)).status.exists():
            return Path(entry.run_path)
        if not Path(entry.local_dir).is_dir():
            raise PageError(
                f"{run_id}: nothing of it lies here: {entry.local_dir} was removed, or never filled."
            )
        return Path(entry.local_dir)

    def remark(self, run_id: str) -> str:
        """Return that a run of a host may be older here than there."""
        entry = None if run_id in self._named else registry.find(run_id)
        if entry is None or entry.target == LOCAL_TARGET:
            return ""
        if last_seen(entry)["state"] in FINAL_STATES:
            return ""
        follow = f"`deploy attach {run_id}` or `deploy ui --remote {entry.target}`"
        return f"This is what came from {entry.target} so far; it grows while {follow} follows the run."

    def close(self) -> None:
        """Do nothing: no run is followed."""


def _entry(run_id: str) -> RunEntry:
    try:
        entry = registry.find(run_id)
    except DeployError as error:
        raise PageError(error.text(launching=False)) from None
    if entry is None:
        raise PageError(
            f"there is no run {run_id!r} on this machine: `deploy ls` lists those that there are."
        )
    return entry


def _check(path: Path, named: Mapping[str, Path]) -> None:
    try:
        read_run(path)
    except NotARunError as error:
        raise DeployError(
            f"{error}.", fix="name a directory that holds a run's files, or none"
        ) from None
    name = path.resolve().name
    if not valid_run_id(name) or name in named:
        raise DeployError(
            f"{path}: {'another directory has the same name' if name in named else 'its name is not that of a run'}.",
            needed="directories with names of letters, digits, '-' and '_', each another",
        )


def _row(path: Path) -> dict[str, Any]:
    """Return a directory as `deploy ls` shows a run."""
    run = RunDir(path)
    status = observe(run).status
    row: dict[str, Any] = {"state": status.state if status else "unknown"}
    if status:
        row["step"] = last_step(run, status.stage)
        names = ("stage", "started_at", "exit_code", "message")
        row |= {name: getattr(status, name) for name in names}
    experiment = status.experiment_name if status else ""
    return list_row(str(path), experiment, path.name, row) | {"tags": []}
