"""The look for a run's processes: whole ids, and only runs of this test process."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.run_processes import commands_of, processes_of


@contextmanager
def process(run_id: str, run_path: Path) -> Iterator[int]:
    marks = {"ROLLOUTS_RUN_ID": run_id, "ROLLOUTS_RUN_PATH": str(run_path)}
    started = subprocess.Popen(["sleep", "1000"], env={**os.environ, **marks})
    try:
        yield started.pid
    finally:
        started.kill()
        started.wait()


def test_only_own_runs_are_seen(tmp_path: Path) -> None:
    """Goal: two tests that run side by side may name their runs alike. Red with the id alone: SGLang's test saw the
    tutorial's run, both "here", and failed."""
    elsewhere = Path("/tmp/another test process/runs/here")
    with (
        process("here", elsewhere),
        process("here", tmp_path / "runs/here") as own,
        process("here-2", tmp_path / "runs/here-2"),
    ):
        assert processes_of("here") == [own]
        assert commands_of("here") == ["sleep 1000 "]
    assert processes_of("here") == []
