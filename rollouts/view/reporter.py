"""What a verb that follows a run tells its screen, whichever that is."""

from typing import Any, Protocol

from rollouts.view.fold import View


class Reporter(Protocol):
    """Where what happens is shown."""

    def say(self, phase: str, text: str) -> None:
        """Something that deploy itself does, or a notice."""
        ...

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        """A new row of one of LINE_FILES, and the view after it."""
        ...

    def alive(self, doing: str) -> None:
        """The host is there; `doing` is what its run says that it does."""
        ...

    def close(self) -> None:
        """The display is over; plain printing may follow."""
        ...
