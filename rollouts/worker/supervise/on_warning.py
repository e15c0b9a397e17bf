"""output.on_warning: the user's command for each `warning` event, one after another, on a thread of its own.

A command that hangs costs the run nothing; those behind it wait for it. Standard library only.
"""

import queue
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from rollouts.run_dir import RunDir
from rollouts.worker.on_end import ON_WARNING_S
from rollouts.worker.processes import SUPERVISOR_STAGE, window_mark
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.user_command import UserCommand

FIELD = "on_warning"
MARK = window_mark(SUPERVISOR_STAGE, FIELD)
WAITING_MAX = 20  # warnings; of more the rest is not told


class WarningCommand:
    """Runs the command for each warning that is offered."""

    def __init__(self, run: RunDir, command: str) -> None:
        self._run, self._command = run, command
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING_MAX)
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run_all, daemon=True)
        self._thread.start()

    def offer(self, warning: Mapping[str, Any]) -> None:
        """Have the command told of a warning, once those before it were."""
        try:
            self._waiting.put_nowait(warning)
        except queue.Full:
            say(f"output.on_warning is not told of: {warning.get('message')}")

    def close(self) -> None:
        """Let it end after the warnings that wait; `is_alive` tells when."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            say("output.on_warning: warnings still wait, and are not told")

    def give_up(self) -> None:
        """Run it for none of the warnings that still wait."""
        self._given_up.set()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run_all(self) -> None:
        while (warning := self._waiting.get()) is not None and not self._given_up.is_set():
            told = {
                "RULE": str(warning.get("cause", "")),
                "STAGE": str(warning.get("stage", "")),
                "MESSAGE": str(warning.get("message", "")).replace("\0", " "),
            }
            what = UserCommand(
                field=FIELD, command=self._command, told=told, limit_s=ON_WARNING_S, mark=MARK
            )
            try:
                found = what.run(self._run, beat=lambda: None)
            except Exception:  # a full disk, a mistake of ours: the run goes on
                say(traceback.format_exc())
            else:
                say(*filter(None, [found["message"]]))
