"""Print a verb's output: text for people or JSON for programs, by one setting.

Text that a host wrote goes through escape.py first.
"""

import json
import os
import shutil
import sys
from typing import Any

from rollouts.view.answer import Answer
from rollouts.view.escape import escaped
from rollouts.view.unread import is_read


class Screen:
    """stdout and stderr of one verb. `as_json`: stdout is for programs."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def show(self, answer: Answer) -> int:
        """Print an answer, to stderr once nobody reads stdout any more. Returns its exit code."""
        if not is_read():
            self.remark((answer.text or "").lstrip("\n"))
        elif self.as_json:
            print_json(answer.document)
        elif answer.text is not None:
            print(answer.text if answer.is_escaped else escaped(answer.text), flush=True)
        for remark in answer.remarks:
            self.remark(remark)
        if answer.alarm:
            self.alarm(answer.alarm)
        return answer.exit_code

    def warn(self, text: str) -> None:
        """Print a warning among the words of a launch."""
        if self.as_json:
            print_json({"type": "progress", "phase": "warning", "message": text})
        else:
            show(f"warning: {text}")

    def remark(self, text: str) -> None:
        """Print a line beside the answer, to stderr."""
        print(escaped(text), file=sys.stderr, flush=True)

    def alarm(self, text: str) -> None:
        """Print a line to stderr that must not be missed: red on a terminal."""
        red, plain = ("\x1b[1;31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}warning: {escaped(text)}{plain}", file=sys.stderr, flush=True)

    def say(self, phase: str, text: str) -> None:
        """Print what is done beside the answer, to stderr: a `reporter.Say`."""
        self.remark(f"{phase}: {text}")

    def error(self, document: dict[str, Any], text: str) -> None:
        """Print an error: its text to stderr, and its document where programs read."""
        if self.as_json:
            print_json(document)
        print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def show(text: str) -> None:
    """Print text that may hold what a host or a model wrote."""
    print(escaped(text), flush=True)


def takes_colour() -> bool:
    """Return whether stdout is a terminal with colours, whose user wants them (no-color.org)."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def terminal_width() -> int | None:
    """Return the columns of the terminal that stdout is; None for a pipe or a file, where width does not matter."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
