"""Run the user's command at the run's end, once. Standard library only."""

import os
from collections.abc import Callable
from typing import Any

from rollouts.run_dir import RunDir, State
from rollouts.worker.on_end import ON_END_S
from rollouts.worker.processes import SUPERVISOR_STAGE, SUPERVISOR_WINDOW, window_mark
from rollouts.worker.supervise.user_command import UserCommand


def run_at_end(
    run: RunDir, command: str, state: State, code: int, *, beat: Callable[[], None]
) -> dict[str, Any]:
    """Run the command to its end, or end it, and all that it started. Return the fields of the `on_end` event."""
    told = {"STATE": state, "EXIT_CODE": str(code)}
    mark = window_mark(SUPERVISOR_STAGE, SUPERVISOR_WINDOW)
    what = UserCommand(field="on_end", command=command, told=told, limit_s=ON_END_S, mark=mark)
    return what.run(run, beat=beat, ancestors={os.getpid()})
