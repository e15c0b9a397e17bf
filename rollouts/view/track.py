"""Copy a run directory into a tracker, from where the last copy ended: a step is never there twice."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.plain_files import reading
from rollouts.run_dir import RunDir, home_dir, parse_row
from rollouts.view.json_numbers import is_number
from rollouts.view.run_data import RunData
from rollouts.view.tracker_cursor import Cursor, home_cursor
from rollouts.view.trackers import TrackedStage, Tracker, open_tracker, place_of

TABLE_ROWS_MAX = 64
TABLE_BYTES_MAX = 16 << 20  # from the end of a file, looked through for them
SAMPLE_COLUMNS = ("prompt", "response", "reward", "advantage")
ANSWER_COLUMNS = ("row", "task", "answer", "correct")


@dataclass(frozen=True)
class Tracked:
    """What a copy brought to a tracker."""

    stages: tuple[str, ...]
    steps: int  # that were new there


def track(run: RunData, kind: str, project: str) -> Tracked:
    """Bring every logged step, the config and the last samples of each stage to a tracker.

    Raises ModuleNotFoundError without its package, and whatever the tracker raises; what it took stays noted then.
    """
    directory = home_dir() / "trackers" / kind
    cursor = home_cursor(RunDir(run.path), kind, project, place_of(kind, directory))
    copy = Copy(RunDir(run.path), kind, cursor, run.config or {}, directory)
    try:
        count = sum(copy.bring(run.metrics[stage]) for stage in run.stages)
        copy.finish()
    finally:
        copy.close(failed=False)
    return Tracked(run.stages, count)


class Copy:
    """Brings rows of metrics.jsonl to a tracker. One stage is open there at a time, from its first new step on."""

    def __init__(
        self, run: RunDir, kind: str, cursor: Cursor, config: Mapping[str, Any], directory: Path
    ) -> None:
        self._run, self._kind, self._cursor = run, kind, cursor
        self._config, self._directory = config, directory
        self._open: tuple[str, Tracker] | None = None
        self._shown = -1  # the step of the open stage whose tables were sent

    def bring(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Send the steps that the tracker lacks, in the order of the rows. Returns how many. Raises as the tracker."""
        count = 0
        for row in rows:
            stage, step = row["stage"], row["step"]
            if step <= self._cursor.steps.get(stage, -1):
                continue
            tracker = self._of(stage)
            tracker.log(step, float(row["time"]), _numbers(row))
            tracker.flush()
            self._cursor.note(stage, step)
            count += 1
            if any(name.startswith("eval_") for name in row):
                self._tables(stage, tracker)
        return count

    def finish(self) -> None:
        """Send the tables of the stage's last step, unless they were. Raises as the tracker."""
        if self._open is not None:
            self._tables(*self._open)

    def close(self, *, failed: bool) -> None:
        """Close the stage that is open. Raises as the tracker."""
        if self._open is not None:
            (_, tracker), self._open = self._open, None
            tracker.close(failed=failed)

    def _of(self, stage: str) -> Tracker:
        if self._open is None or self._open[0] != stage:
            self.finish()
            self.close(failed=False)
            self._open, self._shown = (stage, open_tracker(self._kind, self._told(stage))), -1
        return self._open[1]

    def _told(self, stage: str) -> TrackedStage:
        output = self._config.get("output")
        group = output.get("experiment_name") if isinstance(output, dict) else None
        key = json.dumps([self._cursor.key, stage])
        return TrackedStage(
            project=self._cursor.project,
            group=str(group or self._run.run_id),
            name=f"{self._cursor.name}-{stage}",
            run_key=hashlib.sha256(key.encode()).hexdigest()[:16],
            config=self._config,
            directory=self._directory,
        )

    def _tables(self, stage: str, tracker: Tracker) -> None:
        """Send the samples of the last step that has some, and the last answers to held-out rows."""
        step = self._cursor.steps.get(stage, -1)
        if step == self._shown:
            return
        self._shown = step
        samples = _last(self._run.rollouts, lambda row: stage == "rl", step, SAMPLE_COLUMNS)
        answers = _last(
            self._run.eval_samples, lambda row: row.get("stage") == stage, step, ANSWER_COLUMNS
        )
        for name, rows in (("samples", samples), ("eval_samples", answers)):
            if rows:
                tracker.table(name, step, rows)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    hidden = ("step", "time")
    return {
        name: float(value) for name, value in row.items() if name not in hidden and is_number(value)
    }


def _last(
    path: Path, wanted: Callable[[Mapping[str, Any]], bool], until: int, shown: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return rows of the last step that has some, no later than `until`."""
    found: list[dict[str, Any]] = []
    last: object = None
    for row in _end_of(path):
        step = row.get("step")
        if wanted(row) and type(step) is int and step <= until:
            found = found if step == last else []
            last = step
            if len(found) < TABLE_ROWS_MAX:
                found.append({name: row.get(name) for name in shown})
    return found


def _end_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the last rows of a file, which may be large."""
    try:
        with reading(path) as stream:
            begin = max(0, stream.seek(0, os.SEEK_END) - TABLE_BYTES_MAX)
            stream.seek(begin)
            lines = stream.read(TABLE_BYTES_MAX).split(b"\n")[:-1]
    except FileNotFoundError:
        return
    for line in lines[1:] if begin else lines:  # the first began before
        if (row := parse_row(line)) is not None:
            yield row
