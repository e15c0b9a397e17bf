"""What a verb returns, for its caller to print."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a verb found or did: a text for people, one JSON document for programs, and the command's exit code."""

    document: Any
    text: str | None  # None: it was printed as it came
    exit_code: int = 0
    remarks: tuple[str, ...] = ()  # printed to stderr in both forms
    alarm: str = ""  # likewise, and red
    is_escaped: bool = (
        False  # what a host or a model wrote in `text` was made safe; it may have colours
    )
