"""From where a run can go on: its newest whole checkpoint, and the rows that come before it, which the next one has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.manifest import manifest_problems
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.run.mirror_files import is_checkpoint, replace
from rollouts.remote.run.registry import BEGINS, RunEntry
from rollouts.run_dir import TRACKER_GLOB, RunDir, parse_row

ORDER = ("base", "sft", "rl")  # of stages, in the rows of a run
ROW_FILES = ("metrics.jsonl", "eval.jsonl")  # a resumed run's begin with those of the run before it


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from."""

    stage: str
    step: int
    path: Path  # here
    stages: tuple[str, ...]  # what is left to run, this stage first unless it had ended
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the checkpoint's path in its run."""
        return f"checkpoints/{self.stage}/{self.path.name}"


def find_origin(run: RunDir, stages: Sequence[str]) -> Origin:
    """Return from where a run of these stages goes on. Raises DeployError where there is nothing to go on from.

    The checkpoint of a stage's last step is complete before that step's evaluation and metrics: unless the stage has
    ended, an earlier one is taken, so that none of these are missing.
    """
    events = list(_rows(run, "events.jsonl"))
    ended = {row.get("stage") for row in events if row.get("kind") == "stage_ended"}
    totals = {
        row.get("stage"): row.get("steps_total")
        for row in events
        if row.get("kind") == "training_started"
    }
    notes: list[str] = []
    for at in reversed(range(len(stages))):
        stage, at_end = stages[at], None
        for path in _checkpoints(run, stage):
            step = int(path.name.removeprefix("step_"))
            if problems := manifest_problems(path):
                first = problems[0].replace(f"{path}/", "")
                notes.append(
                    f"checkpoints/{stage}/{path.name} is damaged, and is left out: {first}"
                )
            elif stage in ended:
                if not stages[at + 1 :]:
                    raise _nothing_left(run, stage, step)
                return Origin(stage, step, path, tuple(stages[at + 1 :]), tuple(notes))
            elif step == totals.get(stage):
                at_end = Origin(stage, step, path, tuple(stages[at + 1 :]))
            else:
                return Origin(stage, step, path, tuple(stages[at:]), tuple(notes))
        if at_end is not None:
            if not at_end.stages:
                raise _nothing_left(run, stage, at_end.step)
            notes.append(f"{stage} had taken its last step, and its last evaluation is missing")
            return Origin(at_end.stage, at_end.step, at_end.path, at_end.stages, tuple(notes))
    raise DeployError(
        f"{run.run_id} has no whole checkpoint to go on from.",
        found="; ".join(notes) or f"no completed checkpoint in {run.checkpoints}",
        fix="start it anew: deploy CONFIG; sft.checkpoint_every and rl.save_every save more often",
    )


def _nothing_left(run: RunDir, stage: str, step: int) -> DeployError:
    return DeployError(
        f"{run.run_id} has taken its last step: {stage} step {step}. No step is left.",
        needed="a run that has steps left",
        fix=f"scripts/run_eval.py measures checkpoints/{stage}/step_{step:06d};"
        " a new config with output.source_checkpoint and more steps trains on",
    )


def _checkpoints(run: RunDir, stage: str) -> list[Path]:
    """Return the stage's checkpoints that are here, the newest first."""
    found = [
        path
        for path in (run.checkpoints / stage).glob("step_*")
        if path.is_dir() and not path.is_symlink()
    ]
    named = [path for path in found if is_checkpoint(f"checkpoints/{stage}/{path.name}")]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def rows_before(run: RunDir, origin: Origin) -> dict[str, str]:
    """Return the run's rows up to the checkpoint, as the text that each file of the next run begins with."""
    rows = {
        name: "".join(line for line, row in _lines(run, name) if _is_before(row, origin))
        for name in ROW_FILES
    }
    trackers = sorted(run.path.glob(TRACKER_GLOB))  # the same runs there go on
    return rows | {f"trackers/{file.name}": read_plain(file).decode() for file in trackers}


def _is_before(row: dict[str, Any], origin: Origin) -> bool:
    """Return whether it is of a stage before the checkpoint's, or of its own up to its step."""
    stage, step = row.get("stage"), row.get("step")
    if stage not in ORDER or not isinstance(step, int):
        return False
    place, last = ORDER.index(stage), ORDER.index(origin.stage)
    return place < last or (place == last and step <= origin.step)


def _rows(run: RunDir, name: str) -> Iterator[dict[str, Any]]:
    return (row for _, row in _lines(run, name))


def _lines(run: RunDir, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the whole lines of a file; a torn last one, or one that is not an object, is left out."""
    try:
        text = read_plain(run.path / name)
    except FileNotFoundError:
        return
    for line in text.split(b"\n")[:-1]:
        if (row := parse_row(line)) is not None:
            yield f"{line.decode(errors='replace')}\n", row


def begins(entry: RunEntry) -> dict[str, str]:
    """Return what files of the run begin with: rows of the run that it goes on from, how far its trackers are."""
    top = entry.record.path / BEGINS
    files = sorted([*top.glob("*.jsonl"), *top.glob(TRACKER_GLOB)])
    return {file.relative_to(top).as_posix(): read_plain(file).decode() for file in files}


def fill_rows(entry: RunEntry) -> None:
    """Write to the mirror, after the launch, what the host's files begin with: rows that were shown before."""
    for name, text in begins(entry).items():
        if not (entry.mirror.path / name).exists():
            replace(entry.mirror.path, name, text.encode())
