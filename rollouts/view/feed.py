"""Feed a tracker with a run that goes on: a process beside it, which the run never waits for but at its end.

    python -m rollouts.view.feed <run_path> <kind> <project> <directory>

It follows metrics.jsonl until the supervisor asks it to end, by the file `.trackers-end.tmp`. It runs in the tracker's
own environment. What the tracker lacks then, `deploy track` sends later.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.run_dir import NewRows, RunDir
from rollouts.view.run_data import is_metrics_row
from rollouts.view.track import Copy
from rollouts.view.tracker_cursor import run_cursor
from rollouts.view.trackers import place_of

POLL_S = 0.5
NICENESS = 15  # what it computes waits for what the run does


class Feed:
    """One tracker of a run."""

    def __init__(self, run: RunDir, kind: str, project: str, directory: Path) -> None:
        self._run, self._rows = run, NewRows(run.metrics)
        cursor = run_cursor(run, kind, project, place_of(kind, directory))
        self._copy = Copy(run, kind, cursor, json.loads(read_plain(run.config)), directory)
        self._end = ""  # the run's state, once it ends

    def main(self) -> None:
        """Send what there is and what comes, until the run ends. Raises as the tracker, and OSError."""
        signal.signal(signal.SIGTERM, self._ask)  # without the file, on a full disk
        try:
            while not (state := self._end or self._asked()):
                self._bring()
                time.sleep(POLL_S)
            self._bring()
            self._copy.finish()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._copy.close(failed=True)
            raise
        self._copy.close(failed=state == "failed")

    def _bring(self) -> None:
        more = True
        while more:
            found = self._rows.look()
            self._copy.bring([row for row in found.rows if is_metrics_row(row)])
            more = found.more

    def _ask(self, _signum: int, _frame: Any) -> None:
        self._end = "stopped"

    def _asked(self) -> str:
        try:
            return read_plain(self._run.trackers_end).decode() or "stopped"
        except FileNotFoundError:
            return ""


def main() -> None:
    path, kind, project, directory = sys.argv[1:]
    os.nice(NICENESS)
    try:
        Feed(RunDir(Path(path)), kind, project, Path(directory)).main()
    except Exception as error:  # a tracker may raise anything; what it took is noted
        sys.exit(f"error: {kind} failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
