"""How far a tracker is: the last step of each stage that it has, in a small file. Nothing is sent twice by it.

The process beside a run keeps it in the run directory, so that it comes along with the results, and with a run that
goes on from this one; `deploy track` keeps its own in this machine's rollouts home.
"""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.run_dir import RunDir, home_dir, valid_run_id, write_json_atomic

_KEY = re.compile(r"[0-9a-f]{8,64}")


@dataclass
class Cursor:
    """The runs of a tracker that one run is copied into, and how far each is."""

    path: Path
    project: str
    place: (
        str  # where the tracker keeps them: what is at another place has to be brought there anew
    )
    key: str  # tells the run from all others
    name: str  # of the run there; of one that goes on from another, that one's
    steps: dict[str, int] = field(default_factory=dict)  # the last one, by stage

    def note(self, stage: str, step: int) -> None:
        """Record that the tracker has this step. Raises OSError."""
        self.steps[stage] = step
        self.write()

    def write(self) -> None:
        shown = {name: getattr(self, name) for name in ("project", "place", "key", "name", "steps")}
        write_json_atomic(self.path, shown, mode=0o600)


def run_cursor(run: RunDir, kind: str, project: str, place: str) -> Cursor:
    """Return the cursor in the run directory, made where it is missing. Raises OSError."""
    path = run.tracker(kind)
    found = _read(path, project)
    if found is None:
        found = Cursor(path, project, place, secrets.token_hex(8), run.run_id)
    _move(found, place)
    found.write()
    return found


def home_cursor(run: RunDir, kind: str, project: str, place: str) -> Cursor:
    """Return this machine's cursor for a run; it goes on from the one in the run directory."""
    named = json.dumps([str(run.path.resolve()), kind, project])
    digest = hashlib.sha256(named.encode()).hexdigest()
    path = home_dir() / "trackers" / f"{run.run_id}-{digest[:12]}.json"
    of_run, own = _read(run.tracker(kind), project), _read(path, project)
    found = own or Cursor(path, project, place, digest[:16], run.run_id)
    _move(found, place)
    if of_run is None:
        return found
    _move(of_run, place)
    stages = found.steps.keys() | of_run.steps.keys()
    steps = {
        stage: max(found.steps.get(stage, -1), of_run.steps.get(stage, -1)) for stage in stages
    }
    return Cursor(path, project, place, of_run.key, of_run.name, steps)


def _move(cursor: Cursor, place: str) -> None:
    if cursor.place != place:
        cursor.place, cursor.steps = place, {}


def _read(path: Path, project: str) -> Cursor | None:
    """Return what is there for this project; None for nothing, or for what is damaged: it may come from a host."""
    try:
        found: Any = json.loads(read_plain(path))
        texts = [found[name] for name in ("project", "place", "key", "name")]
        steps = {str(stage): step for stage, step in found["steps"].items() if type(step) is int}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if texts[0] != project or not all(isinstance(text, str) for text in texts):
        return None
    if not _KEY.fullmatch(texts[2]) or not valid_run_id(texts[3]):
        return None
    return Cursor(path, project, texts[1], texts[2], texts[3], steps)
