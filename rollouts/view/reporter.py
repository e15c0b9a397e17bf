"""What a verb that follows a run tells its display."""

from collections.abc import Callable
from typing import Any, Protocol

from rollouts.view.fold import View

Say = Callable[[str, str], None]  # phase ("sync", "launch", …), what is happening


def silent(phase: str, text: str) -> None:
    """Say nothing."""


class Reporter(Protocol):
    """A display of what happens."""

    def say(self, phase: str, text: str) -> None:
        """Show what deploy itself does, or a notice."""
        ...

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        """Show a new row of one of the run's JSON Lines files; `view` is the run after it."""
        ...

    def alive(self, doing: str) -> None:
        """Note a sign of life; `doing` is what the run says that it does."""
        ...

    def take_stop(self) -> bool:
        """Return whether the user asked here to stop the run, before the display interrupted; once."""
        ...

    def close(self) -> None:
        """End the display; plain printing may follow."""
        ...
