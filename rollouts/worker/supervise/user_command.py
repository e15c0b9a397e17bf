"""Run a shell command of the user's config: bounded in time, with its output in a log. Standard library only."""

import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rollouts.engines.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from rollouts.run_dir import RunDir
from rollouts.worker.on_end import KILL_AFTER_S
from rollouts.worker.processes import POLL_S, WINDOW_VARIABLE, end_marked
from rollouts.worker.supervise.output import Output


@dataclass(frozen=True, kw_only=True)
class UserCommand:
    """A command of `output`, and what it is told."""

    field: str  # "on_end"; its output is in logs/on_end.log
    command: str
    told: Mapping[str, str]  # variables, without ROLLOUTS_ before their names
    limit_s: float
    mark: str  # of its processes, as `window_mark` makes it

    def run(
        self, run: RunDir, *, beat: Callable[[], None], ancestors: Collection[int] = ()
    ) -> dict[str, Any]:
        """Run it to its end, or end it, with all that carries its mark or descends from `ancestors`.

        It starts in the user's repository, with the supervisor's environment less the engines' keys. Returns
        {"exit_code", "seconds", "message"}: the message says what went wrong, or is None.
        """
        began = time.monotonic()
        output = Output(run, self.field)
        try:
            child = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                env=self._environment(run),
                cwd=run.code_tree,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (
            OSError,
            ValueError,
        ) as error:  # no shell, no such directory, a zero byte in the command
            output.close()
            message = f"output.{self.field} did not start: {error}"
            return {"exit_code": None, "seconds": 0.0, "message": message}
        assert child.stdout is not None
        output.follow(child.stdout.fileno())
        while child.poll() is None and time.monotonic() < began + self.limit_s:
            beat()
            time.sleep(POLL_S)
        ended = child.poll()
        end_marked(run, {self.mark}, grace_s=KILL_AFTER_S, ancestors=ancestors, tick=beat)
        child.poll()
        output.close()
        found = {"exit_code": ended, "seconds": round(time.monotonic() - began, 3)}
        return {**found, "message": self._message(ended)}

    def _environment(self, run: RunDir) -> dict[str, str]:
        own = {
            name: value
            for name, value in os.environ.items()
            if name not in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)
        }
        told = {"RUN_ID": run.run_id, "RUN_DIR": str(run.path), **self.told}
        variables = {f"ROLLOUTS_{name}": value for name, value in told.items()}
        return {**own, **variables, WINDOW_VARIABLE: self.mark}

    def _message(self, code: int | None) -> str | None:
        """Return what went wrong with it; None for nothing."""
        if code == 0:
            return None
        how = (
            f"still ran after {self.limit_s:g} s, and was ended"
            if code is None
            else f"ended with {code}"
        )
        return f"output.{self.field} {how}: logs/{self.field}.log has what it said"
