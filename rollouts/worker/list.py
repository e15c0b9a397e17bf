"""The runs on this host, as their files tell it: one JSON list.

    python3 -m rollouts.worker.list <home>

Standard library only; a few small reads per run, so that hundreds take well under a second.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.run_dir import RunDir, State, Status

START_WAIT_S = 30.0  # between the launcher's first status and the supervisor's lock


@dataclass(frozen=True)
class Observed:
    """What a run looks like from outside, now."""

    state: State  # "died" when it never reached a final state and nobody supervises it
    exit_code: int | None
    live: bool  # a supervisor holds the lock, or is about to
    status: Status | None  # None for a file that is missing or damaged


def observe(run: RunDir) -> Observed:
    """The lock is read before the status: a supervisor writes its final status before it lets go."""
    live = run_dir.is_live(run)
    try:
        status = run_dir.read_status(run)
    except (ValueError, TypeError):  # damaged by something else than us: writes are atomic
        status = None
    if status is None:
        return Observed("starting" if live else "died", None, live, None)
    if status.state in run_dir.FINAL_STATES:
        return Observed(status.state, status.exit_code, live, status)
    waiting = not run.lock.exists() and time.time() - status.updated_at < START_WAIT_S
    if live or waiting:
        return Observed(status.state, None, True, status)
    return Observed("died", None, False, status)


def list_runs(home: Path) -> list[dict[str, Any]]:
    """All launched runs under `home`, oldest first; [] where there is none.

    Each: run_id, experiment_name, state, stage, step (of the last metrics row), started_at, exit_code, live. A
    directory whose code was synced but that was never launched has no status.json and is no run yet.
    """
    rows = []
    for path in (home / "runs").glob("*/status.json"):
        run = RunDir(path.parent)
        seen = observe(run)
        rows.append(
            {
                "run_id": run.run_id,
                "experiment_name": seen.status.experiment_name if seen.status else None,
                "state": seen.state,
                "stage": seen.status.stage if seen.status else None,
                "step": _last_step(run),
                "started_at": seen.status.started_at if seen.status else path.stat().st_mtime,
                "exit_code": seen.exit_code,
                "live": seen.live,
            }
        )
    return sorted(rows, key=lambda row: (row["started_at"], row["run_id"]))


def _last_step(run: RunDir) -> int | None:
    try:
        row = run_dir.last_jsonl_row(run.metrics)
    except ValueError:  # a damaged line: the list is no place to fail for it
        return None
    return row.get("step") if row else None


def main() -> None:
    home = Path(sys.argv[1]).expanduser() if len(sys.argv) > 1 else run_dir.home_dir()
    print(json.dumps(list_runs(home)))


if __name__ == "__main__":
    main()
