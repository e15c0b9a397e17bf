"""Remove a run from this host, or tell what it holds. Sent from the laptop by `deploy rm`. Standard library only.

python3 remove_run.py look RUN_PATH                  prints {"results": {name: mark}}
python3 remove_run.py remove RUN_PATH PLACES         prints {"removed": bool, "reason": text, "bytes": int}

PLACES is a JSON list of other paths of the run, which no live run may use either.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rollouts.run_dir import RunDir, remove_transient
from rollouts.run_dir.results import results_of
from rollouts.worker import removing
from rollouts.worker.disk_use import freed_bytes


def remove_run(run: RunDir, places: list[str]) -> dict[str, Any]:
    """Remove a run that is over, and that no live run uses. Done twice, the second time finds nothing."""
    home = run.path.parent.parent
    if not os.path.lexists(run.path):
        return _answer(True, "", 0)
    if reason := removing.why_not_a_run(run):
        return _answer(False, reason, 0)
    with removing.no_launches(home), removing.ended(run) as in_use:
        if in_use:
            return _answer(False, in_use, 0)
        files = [str(run.path), run.real_path, *places]
        if used := removing.why_used(files, removing.live_runs(home), but=run.run_id):
            return _answer(False, used, 0)
        size = freed_bytes([run.path])
        remove_transient(run)
        _drop_links(run, home)
        aside = removing.set_aside(run.path, home)
    left = removing.remove_tree(aside)
    return _answer(True, f"not all of it could be removed: {left}" if left else "", size)


def _drop_links(run: RunDir, home: Path) -> None:
    """Remove the links to a project's last tree that lead into the run."""
    for link in (home / "code").glob("*"):
        if link.is_symlink() and Path(os.readlink(link)).is_relative_to(run.path):
            link.unlink()


def _answer(removed: bool, reason: str, size: int) -> dict[str, Any]:
    return {"removed": removed, "reason": reason, "bytes": size}


def main() -> None:
    run = RunDir(Path(sys.argv[2]))
    if sys.argv[1] == "look":
        print(json.dumps({"results": results_of(run)}))
    else:
        print(json.dumps(remove_run(run, json.loads(sys.argv[3]))))


if __name__ == "__main__":
    main()
