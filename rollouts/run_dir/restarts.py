"""restarts.json: where a stage whose trainer died goes on, and what of the rows before it counts no more.

A cut file is a new one in its place, so that whoever follows it notices; here it is told how much of it was kept.
Standard library only.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollouts.plain_files import read_plain, reading
from rollouts.run_dir.files import parse_row, write_json_atomic
from rollouts.run_dir.layout import ROW_FILES, RunDir

BASE = "base"  # the stage of what is measured before the first stage's first step


@dataclass(frozen=True, kw_only=True)
class Restart:
    """One restart of a stage."""

    stage: str
    step: int  # the last one that counts; 0: none
    # of this step, a path in the run directory; None: the stage begins as at first
    checkpoint: str | None
    kept: dict[str, int]  # bytes of each file of rows that was cut


def read_restarts(run: RunDir) -> list[Restart]:
    """Return the run's restarts, the first one first; [] for none. Raises ValueError for a damaged file."""
    try:
        found = json.loads(read_plain(run.restarts))
    except FileNotFoundError:
        return []
    return [Restart(**item) for item in found]


def restart_from(run: RunDir, stage: str) -> str | None:
    """Return the checkpoint, a path in the run directory, that this life of the stage goes on from; None for none."""
    restarts = [item for item in read_restarts(run) if item.stage == stage]
    return restarts[-1].checkpoint if restarts else None


def note_restart(
    run: RunDir, stage: str, step: int, checkpoint: str | None, *, first: bool
) -> None:
    """Write a restart down, and cut the rows of later steps off. `first`: it is the run's first stage.

    Raises OSError. Done again after a cut-off try, it comes to the same.
    """
    drops = {stage, BASE} if first and step == 0 else {stage}
    kept = {}
    for name in ROW_FILES:
        path = run.path / name
        with contextlib.suppress(FileNotFoundError):
            bytes_kept = _bytes_before(path, drops, step)
            if bytes_kept < path.stat().st_size:
                kept[name] = bytes_kept
    restart = Restart(stage=stage, step=step, checkpoint=checkpoint, kept=kept)
    items = [asdict(item) for item in (*read_restarts(run), restart)]
    write_json_atomic(run.restarts, items)
    for name, size in kept.items():
        _cut(run.path / name, size)


def _bytes_before(path: Path, drops: set[str], step: int) -> int:
    """Return how many bytes come before the first row of `drops` that is of a later step, or was torn at the end."""
    size = 0
    with reading(path) as stream:
        for line in stream:
            row = parse_row(line) if line.endswith(b"\n") else {}
            if not line.endswith(b"\n") or (row is not None and _is_after(row, drops, step)):
                break
            size += len(line)
    return size


def _is_after(row: dict[str, Any], drops: set[str], step: int) -> bool:
    found = row.get("step")
    after = not isinstance(found, int) or found > step or step == 0
    return row.get("stage", "rl") in drops and after  # samples have no stage: they are rl's


def _cut(path: Path, size: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with reading(path) as source, temporary.open("wb") as target:
        for block in _blocks(source, size):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    shutil.copymode(path, temporary)
    temporary.replace(path)


def _blocks(stream: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (block := stream.read(min(size, 1 << 20))):
        size -= len(block)
        yield block
