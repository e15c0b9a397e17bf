"""Make text of a host or a model safe to show: characters that steer a terminal are spelled out."""

import re
import sys
from typing import Any, TextIO

# C0 but newline and tab, DEL, C1; then what turns or hides text: bidirectional marks, overrides and isolates,
# zero-width characters, line and paragraph separators, the byte order mark, tags; and halves of surrogate pairs, which
# cannot be encoded.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def escaped(text: str) -> str:
    """Return `text` with every character that steers a terminal as `\\x1b`; newlines and tabs stay."""
    return _STEERING.sub(_spelled, text.replace("\r\n", "\n"))


def one_line(value: Any, *, limit: int = 400) -> str:
    """Return `value` as escaped text on one line, cut after `limit` characters."""
    text = escaped(str(value)).replace("\n", "\\n").replace("\t", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def tolerate_odd_text(*streams: TextIO) -> None:
    """Print what a terminal's encoding lacks as an escape, in place of failing half-way."""
    for stream in streams or (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
