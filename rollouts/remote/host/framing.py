"""A command's own output, told apart from what the host's shell prints around it. Pure.

Start-up files, a ForceCommand or a trap may print before, after and without a line's end. So every command is one line
for `sh -s`, sent over stdin: the login shell, whatever it is, only ever sees `sh -s`. That line prints a random mark
on both outputs, runs the command, and prints another mark with the exit code. All outside of the marks is noise.
"""

import base64
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

SHELL_COMMAND = "sh -s"
NOISE_BYTES_MAX = 64 * 1024
# of a followed command: the longest of ours is a snapshot of 1 MiB, escaped
LINE_BYTES_MAX = 16 << 20
OUTPUT_BYTES_MAX = 256 << 20  # of a command's whole output
SHOWN_BYTES = 120
CODE_BYTES_MAX = 32  # of an exit code

# English messages, which we read, in the host's own character set. Before the first mark: a locale that the host lacks
# makes some shells complain.
_LOCALE = (
    'if [ -n "${LC_ALL-}" ]; then LANG=$LC_ALL; LC_CTYPE=$LC_ALL; export LANG LC_CTYPE; unset LC_ALL; fi; '
    "LC_MESSAGES=C; LANGUAGE=; export LC_MESSAGES LANGUAGE"
)


@dataclass(frozen=True)
class Frame:
    """The marks around one command's output."""

    begin: bytes  # with its line's end
    end: bytes  # the exit code and a line's end follow


def new_frame() -> Frame:
    token = secrets.token_hex(16)
    return Frame(f"rollouts-begin-{token}\n".encode(), f"rollouts-end-{token} ".encode())


def framed_line(argv: Sequence[str], cwd: str | None, frame: Frame) -> bytes:
    """Return the line for `sh -s` that runs `argv` in `cwd` between the marks.

    It is one line, since a shell may read ahead: it has read all of it once the first mark is out, and what follows on
    stdin is the command's.
    """
    begin, end = frame.begin.decode().strip(), frame.end.decode().strip()
    enter = "" if cwd is None else f"cd {shlex.quote(cwd)} >/dev/null && "
    steps = (
        _LOCALE,
        f"printf '%s\\n' {begin}",
        f"printf '%s\\n' {begin} >&2",
        f"{enter}{shlex.join(argv)}",
        "code=$?",
        f"printf '%s %d\\n' {end} $code",
        f"printf '%s %d\\n' {end} $code >&2",
        "exit $code",
    )
    return "; ".join(steps).encode(errors="surrogateescape") + b"\n"


def for_any_shell(line: str) -> str:
    """Return a command that runs a line of sh, whichever shell the account has: none reads anything in its words."""
    packed = base64.b64encode(line.encode(errors="surrogateescape")).decode()
    return f"exec sh -c 'eval \"$(echo {packed} | base64 -d)\"'"


class LineSplitter:
    """Cuts a stream into lines. Raises EndlessLineError for one that is longer than anything of ours."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit or LINE_BYTES_MAX
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that end in `data`, each with its end."""
        *ends, rest = data.split(b"\n")
        lines = []
        for piece in ends:
            self._hold(piece)
            lines.append(bytes(self._held) + b"\n")
            self._held.clear()
        if rest:
            self._hold(rest)
        return lines

    def _hold(self, piece: bytes) -> None:
        self._held += piece
        if len(self._held) > self._limit:
            raise EndlessLineError(bytes(self._held[:SHOWN_BYTES]), self._limit)


class EndlessLineError(Exception):
    """A line without an end, or an output without one: nothing of ours is so long."""

    def __init__(self, begin: bytes, limit: int) -> None:
        super().__init__(f"more than {limit} bytes")
        self.begin, self.limit = begin, limit


class FrameReader:
    """Takes what lies between the marks out of a stream, as it comes."""

    def __init__(self, frame: Frame) -> None:
        self._frame, self._held = frame, b""
        self.began = False
        self.code: int | None = None  # of the command, once its end was seen
        self.noise = b""  # what came before the first mark; the first 64 KiB

    @property
    def ended(self) -> bool:
        return self.code is not None

    def feed(self, data: bytes) -> bytes:
        """Return those of the next bytes that are the command's own."""
        if self.ended:
            return b""
        self._held += data
        if not self.began and not self._find_begin():
            return b""
        own, found, rest = self._held.partition(self._frame.end)
        if not found:
            kept = _overlap(self._held, self._frame.end)
            own, self._held = (
                self._held[: len(self._held) - kept],
                self._held[len(self._held) - kept :],
            )
            return own
        digits, line_end, _ = rest.partition(b"\n")
        if not line_end and len(rest) < CODE_BYTES_MAX:  # the code is still on its way
            self._held = self._frame.end + rest
            return own
        self.code, self._held = int(digits) if digits.isdigit() and len(digits) < 6 else 255, b""
        return own

    def rest(self) -> bytes:
        """Return what was held back, at the stream's end."""
        held, self._held = self._held, b""
        if self.began:
            return held
        self.noise = (self.noise + held)[:NOISE_BYTES_MAX]
        return b""

    def _find_begin(self) -> bool:
        before, found, after = self._held.partition(self._frame.begin)
        self.began = bool(found)
        if self.began:
            self._held = after
        else:
            kept = _overlap(before, self._frame.begin)
            before, self._held = before[: len(before) - kept], before[len(before) - kept :]
        self.noise = (self.noise + before)[:NOISE_BYTES_MAX]
        return self.began


def _overlap(data: bytes, mark: bytes) -> int:
    """Return how many of the last bytes may be the beginning of `mark`."""
    return next(
        (
            size
            for size in range(min(len(data), len(mark) - 1), 0, -1)
            if data.endswith(mark[:size])
        ),
        0,
    )
