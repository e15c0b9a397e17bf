"""Live processes of a run that this test process started, as /proc shows them.

Tests run side by side, and two may name their runs alike: a process counts where its run lies under `own_directory`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from rollouts.run_dir import RUN_ID_VARIABLE, RUN_PATH_VARIABLE

own_directory = Path("/")  # of the temporary files of this test process: tests/conftest.py sets it


def processes_of(run_id: str) -> list[int]:
    """Return the pids that carry the run's marks in their environment."""
    return [int(entry.name) for entry in _entries_of(run_id)]


def commands_of(run_id: str) -> list[str]:
    """Return the command lines of the same."""
    found = []
    for entry in _entries_of(run_id):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


def _entries_of(run_id: str) -> Iterator[Path]:
    mark, under = f"{RUN_ID_VARIABLE}={run_id}", os.path.realpath(own_directory)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = os.fsdecode((entry / "environ").read_bytes()).split("\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if mark not in variables:  # whole: another's id may begin alike
            continue
        paths = [v.partition("=")[2] for v in variables if v.startswith(f"{RUN_PATH_VARIABLE}=")]
        # without a path it can be anybody's, so also ours
        if not paths or any(Path(path).is_relative_to(under) for path in paths):
            yield entry
