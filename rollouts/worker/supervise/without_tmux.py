"""Windows without tmux, as a run of Slurm has them: processes beside the supervisor. Standard library only."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rollouts.worker.processes import WINDOW_VARIABLE

# A session of its own, and no parent but the supervisor's wrapper, which adopts and reaps it
_START = 'setsid "$@" </dev/null >/dev/null 2>&1 & echo $!'
START_S = 10.0


class StartError(Exception):
    """The process could not be started."""


def start(command: Sequence[str], *, cwd: Path) -> int:
    """Start a window's wrapper. Returns its process id. Raises StartError."""
    environment = {name: value for name, value in os.environ.items() if name != WINDOW_VARIABLE}
    try:
        done = subprocess.run(
            ["sh", "-c", _START, "sh", *command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise StartError(str(error)) from None
    return int(done.stdout)
