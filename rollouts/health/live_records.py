"""The records of a run that goes on: each look reads only what its files have grown by. Standard library only."""

import bisect
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts.health.rules import JUDGED
from rollouts.health.series import Series
from rollouts.health.usage import is_finite, is_usage_row
from rollouts.run_dir import NewRows, RunDir

USAGE_ROWS = 1000  # the last ones
ROWS_MAX = 20_000  # of evaluations, and of events: the last ones


class LiveRecords:
    """What a run has recorded so far, as far as the rules want to know it."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        files = (run.metrics, run.eval, run.gpu, run.events)
        self._files = {path: NewRows(path) for path in files}
        self._series: dict[tuple[str, str], Series] = {}
        self._steps: dict[str, int] = {}  # by stage: how many were logged, repeated ones too
        self.evaluations: deque[Mapping[str, Any]] = deque(maxlen=ROWS_MAX)
        self.events: deque[Mapping[str, Any]] = deque(maxlen=ROWS_MAX)
        self.usage: deque[Mapping[str, Any]] = deque(maxlen=USAGE_ROWS)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._steps)

    def logged(self, stage: str) -> int:
        """Return how many steps a stage has logged."""
        return self._steps.get(stage, 0)

    def series(self, stage: str, name: str) -> Series:
        return self._series.get((stage, name)) or Series(stage, name)

    def look(self) -> list[Mapping[str, Any]]:
        """Read what is new. Return the new events."""
        for row in self._new_rows(self._run.metrics):
            self._add_step(row)
        for row in self._new_rows(self._run.eval):
            if _is_evaluation(row):
                self.evaluations.append(row)
        self.usage.extend(filter(is_usage_row, self._new_rows(self._run.gpu)))
        new: list[Mapping[str, Any]] = [
            row
            for row in self._new_rows(self._run.events)
            if isinstance(row.get("kind"), str) and is_finite(row.get("time"))
        ]
        self.events.extend(new)
        return new

    def _new_rows(self, path: Path) -> list[dict[str, Any]]:
        found = self._files[path].look()
        if found.anew and path == self._run.eval:  # all that counts is read again
            self.evaluations.clear()
        return found.rows

    def _add_step(self, row: dict[str, Any]) -> None:
        stage, step, time = row.get("stage"), row.get("step"), row.get("time")
        usable = isinstance(stage, str) and type(step) is int and step >= 0 and is_finite(time)
        if not usable:
            return
        self._steps[str(stage)] = self._steps.get(str(stage), 0) + 1
        for name in JUDGED:
            if is_finite(row.get(name)):
                self._add_point(str(stage), name, (int(str(step)), float(time), float(row[name])))  # type: ignore[arg-type]

    def _add_point(self, stage: str, name: str, point: tuple[int, float, float]) -> None:
        """Append a point. A step that was logged before is logged anew, and those after it: a resumed run does that."""
        series = self._series.setdefault((stage, name), Series(stage, name, [], [], []))
        columns: tuple[list[Any], ...] = (series.steps, series.times, series.values)  # type: ignore[assignment]
        place = bisect.bisect_left(columns[0], point[0])
        for column, value in zip(columns, point, strict=True):
            del column[place:]
            column.append(value)


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return (
        isinstance(row.get("stage"), str)
        and isinstance(row.get("metric"), str)
        and type(row.get("step")) is int
        and (row.get("value") is None or is_finite(row["value"]))
    )
