"""A log on a terminal: its characters whole, its control characters spelled out."""

import io
import sys

import pytest

from rollouts.view.log_writer import LogWriter

TEXT = "é ✓ \U0001f600 日本\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_characters_are_not_cut_where_pieces_end(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a character whose bytes come in two pieces is shown whole, and bytes that are not UTF-8 as a replacement.

    Red with each piece decoded alone: replacement characters in the middle of words.
    """
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    write, data = LogWriter(), TEXT.encode() + b"\xff\x1b[2J" + TEXT.encode()
    for at in range(0, len(data), size):
        write(data[at : at + size])
    assert terminal.getvalue() == f"{TEXT}\ufffd\\x1b[2J{TEXT}"
