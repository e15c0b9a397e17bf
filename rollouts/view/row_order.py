"""Rows of several files in the order of time. The files are read side by side, so their rows come file by file."""

import threading
import time
from collections.abc import Callable
from typing import Any

QUIET_S = 0.1  # nothing new for so long: the host's look at its files is over
HELD_MAX_S = 2.0  # rows are shown after so long at the latest, though the host has more to send
Row = tuple[str, dict[str, Any]]


class RowOrder:
    """Collect the rows of one look over the host's files, and hand them on in order once no more come.

    A separate thread hands them on, one at a time, if nothing else happens meanwhile; what fails there is
    raised by the next call.
    """

    def __init__(self, show: Callable[[str, dict[str, Any]], None]) -> None:
        self._show = show
        self._lock = threading.RLock()
        self._held: list[Row] = []
        self._first = self._last = 0.0
        self._timer: threading.Timer | None = None
        self._failure: BaseException | None = None

    def add(self, file: str, row: dict[str, Any]) -> None:
        with self._lock:
            self._raise_failure()
            self._last = time.monotonic()
            if not self._held:
                self._first = self._last
            self._held.append((file, row))
            if self._timer is None:
                self._start_timer()

    def flush(self) -> None:
        with self._lock:
            self._raise_failure()
            held, self._held = self._held, []
            for file, row in in_order(held):
                self._show(file, row)

    def _start_timer(self) -> None:
        self._timer = threading.Timer(QUIET_S, self._on_timer)
        self._timer.daemon = True
        self._timer.start()

    def _on_timer(self) -> None:
        with self._lock:
            now = time.monotonic()
            if self._held and now - self._last < QUIET_S and now - self._first < HELD_MAX_S:
                self._start_timer()
                return
            self._timer = None
            try:
                self.flush()
            except BaseException as error:
                # a closed pipe, for example: the main thread is to end of it
                self._failure = error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def in_order(rows: list[Row]) -> list[Row]:
    """Sort by time; an evaluation, which has no time, comes right after the metrics of its step."""
    timed = sorted(
        (item for item in rows if _time(item) is not None), key=lambda item: _time(item) or 0.0
    )
    after: dict[int, list[Row]] = {}
    for item in rows:
        if _time(item) is None:
            after.setdefault(_place(timed, item), []).append(item)
    ordered = list(after.get(-1, []))
    for index, item in enumerate(timed):
        ordered += [item, *after.get(index, [])]
    return ordered


def _place(timed: list[Row], item: Row) -> int:
    """Return the index in `timed` that it comes after; -1: before all of them."""
    stage, step = item[1].get("stage"), item[1].get("step")
    starts = [
        index for index, (_, row) in enumerate(timed) if row.get("kind") == "training_started"
    ]
    if stage == "base":  # before this run trained anything
        return starts[0] if starts else -1
    place = -1
    for index, (file, row) in enumerate(timed):
        begins = row.get("kind") == "training_started" and stage == row.get("stage")
        trained = (
            file == "metrics.jsonl"
            and row.get("stage") == stage
            and _at_most(row.get("step"), step)
        )
        if begins or trained:
            place = index
    return place


def _at_most(step: object, limit: object) -> bool:
    return isinstance(step, int | float) and isinstance(limit, int | float) and step <= limit


def _time(item: Row) -> float | None:
    value = item[1].get("time")
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else None
