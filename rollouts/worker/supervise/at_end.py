"""Run the user's command at the run's end: once, bounded in time, with its output in a log. Standard library only."""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from rollouts.engines.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from rollouts.run_dir import RunDir, State
from rollouts.worker.on_end import KILL_AFTER_S, ON_END_S
from rollouts.worker.processes import POLL_S, SUPERVISOR_STAGE, SUPERVISOR_WINDOW, end_marked, window_mark
from rollouts.worker.supervise.output import Output

LOG = "on_end"  # logs/on_end.log


def run_at_end(run: RunDir, command: str, state: State, code: int, *, beat: Callable[[], None]) -> dict[str, Any]:
    """Run the command to its end, or end it, and all that it started. Return the fields of the `on_end` event.

    It starts in the user's repository, with the supervisor's environment less the engines' keys.
    """
    began = time.monotonic()
    output = Output(run, LOG)
    try:
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            env=_environment(run, state, code),
            cwd=run.code_tree,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # no shell, no such directory, a zero byte in the command
        output.close()
        return {"exit_code": None, "seconds": 0.0, "message": f"output.on_end did not start: {error}"}
    assert child.stdout is not None
    output.follow(child.stdout.fileno())
    while child.poll() is None and time.monotonic() < began + ON_END_S:
        beat()
        time.sleep(POLL_S)
    ended = child.poll()
    mark = window_mark(SUPERVISOR_STAGE, SUPERVISOR_WINDOW)
    end_marked(run, {mark}, grace_s=KILL_AFTER_S, ancestors={os.getpid()}, tick=beat)
    child.poll()
    output.close()
    found = {"exit_code": ended, "seconds": round(time.monotonic() - began, 3)}
    return {**found, "message": _message(ended)}


def _environment(run: RunDir, state: State, code: int) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)}
    told = {"RUN_ID": run.run_id, "STATE": state, "EXIT_CODE": str(code), "RUN_DIR": str(run.path)}
    return {**own, **{f"ROLLOUTS_{name}": value for name, value in told.items()}}


def _message(code: int | None) -> str | None:
    """Return what went wrong with it; None for nothing."""
    if code == 0:
        return None
    how = f"still ran after {ON_END_S:g} s, and was ended" if code is None else f"ended with {code}"
    return f"output.on_end {how}: logs/{LOG}.log has what it said"
