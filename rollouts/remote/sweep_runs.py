"""A sweep as this machine remembers it, and how its runs ended: `<home>/registry/sweeps/<name>.json`."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen
from rollouts.remote.run.run_names import LAST
from rollouts.run_dir import RunDir, home_dir, iter_jsonl, write_json_atomic
from rollouts.view.fold import ALL_TASKS, number
from rollouts.view.tables import columns

NOT_STARTED = "not started"


@dataclass(frozen=True)
class SweepMember:
    """One run of a sweep."""

    run_id: str
    # of the fields that differ between the runs, by their paths, as JSON has them
    values: dict[str, Any]

    @property
    def differs(self) -> str:
        return " ".join(
            f"{path.rpartition('.')[2]}={number(value)}" for path, value in self.values.items()
        )


@dataclass(frozen=True)
class SweepRecord:
    """The runs of a sweep, in their order."""

    name: str
    target: str
    members: tuple[SweepMember, ...]


@dataclass
class Outcome:
    """How a run of a sweep ended, or where it is, for the table."""

    run: SweepMember
    state: str = NOT_STARTED
    exit_code: int | None = None
    steps: str = "-"
    last: str = "-"  # reward, or loss
    exact_match: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run.run_id,
            "values": self.run.values,
            "state": self.state,
            "exit_code": self.exit_code,
            "steps": self.steps,
            "last": self.last,
            "exact_match": self.exact_match,
        }

    def look_back(self) -> None:
        """Fill in what the run's record and mirror say; a run without them was not started."""
        entry = registry.find(self.run.run_id)
        if entry is None:
            return
        seen = last_seen(entry)
        self.state = NOT_STARTED if seen["state"] == "not launched" else str(seen["state"])
        self.exit_code = seen["exit_code"] if self.exit_code is None else self.exit_code
        row = next(iter(_backwards(entry.mirror, "metrics.jsonl")), {})
        self.steps = f"{row.get('stage')} {number(row.get('step'))}" if row else "-"
        name = "reward_mean" if "reward_mean" in row else "loss"
        self.last = f"{name}={number(row[name])}" if name in row else "-"
        for row in _backwards(entry.mirror, "eval.jsonl"):
            if row.get("metric") == "exact_match" and row.get("task", ALL_TASKS) == ALL_TASKS:
                value = row.get("value")
                self.exact_match = float(value) if isinstance(value, int | float) else None
                return


def _backwards(mirror: RunDir, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from reversed(list(iter_jsonl(mirror.path / name)))
    except (OSError, ValueError, AttributeError, RecursionError):
        return


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    header = ["run", "differs", "state", "steps", "last", "exact_match"]
    rows = []
    for outcome in outcomes:
        match = "-" if outcome.exact_match is None else f"{outcome.exact_match:.4f}"
        rows.append(
            [
                outcome.run.run_id,
                outcome.run.differs,
                outcome.state,
                outcome.steps,
                outcome.last,
                match,
            ]
        )
    return columns([header, *rows])


def as_json_value(value: Any) -> Any:
    """Return a field's value as JSON has it; a group of the schema as its call."""
    return (
        value
        if value is None or isinstance(value, bool | int | float | str | list)
        else repr(value)
    )


# --- records --------------------------------------------------------------------------------------------------------


def remember(name: str, target: str, members: Sequence[SweepMember]) -> SweepRecord:
    """Write down a sweep that is about to start, so that its runs are found together later."""
    registry.registry_dir()
    record = SweepRecord(name, target, tuple(members))
    _directory().mkdir(mode=0o700, exist_ok=True)
    write_json_atomic(
        _directory() / f"{name}.json",
        dataclasses.asdict(record) | {"created_at": time.time()},
        mode=0o600,
    )
    return record


def find_sweep(name: str) -> SweepRecord:
    """Return the sweep of this name, or of a run of this name; the beginning will do, or `last`. Raises DeployError."""
    records = _records()
    if name == LAST and records:
        return records[-1]
    names = {
        record.name: [record.name, *(member.run_id for member in record.members)]
        for record in records
    }
    found = [record for record in records if name in names[record.name]]
    found = found or [
        record for record in records if any(known.startswith(name) for known in names[record.name])
    ]
    if name and len(found) == 1:
        return found[0]
    raise DeployError(
        f"{name!r} names {len(found) or 'no'} {'sweeps' if len(found) > 1 else 'sweep'} of this machine.",
        found=f"sweeps: {', '.join(record.name for record in (found or records)[-8:]) or 'none'}",
        needed="the name of a sweep or of one of its runs, the beginning of one, or `last`",
    )


def _directory() -> Path:
    return home_dir() / "registry" / "sweeps"


def _records() -> list[SweepRecord]:
    """Return the sweeps that were started here, the oldest first, but for damaged files."""
    found = []
    for file in sorted(_directory().glob("[!.]*.json"), key=lambda file: file.stat().st_mtime_ns):
        try:
            data = json.loads(read_plain(file))
            members = tuple(
                SweepMember(str(row["run_id"]), dict(row["values"])) for row in data["members"]
            )
            found.append(SweepRecord(str(data["name"]), str(data["target"]), members))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return found
