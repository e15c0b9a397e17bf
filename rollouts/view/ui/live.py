"""What happens to a run's files, as server-sent events: which of them grew, and the new lines of a log."""

import asyncio
import codecs
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts.plain_files import reading
from rollouts.run_dir import LOG_GLOB, RunDir
from rollouts.view.escape import escaped
from rollouts.view.ui.desk import WATCHED, signature

POLL_S = 0.25
STATE_S = 2.0  # between two looks whether the run still lives
PING_S = 10.0  # a browser that went away is noticed by then
LOG_BEGIN_BYTES = 64 << 10  # of a log's end that are sent at first
LOG_BYTES_MAX = 256 << 10  # of a log that are sent at a time
VERSION_NAMES = (*WATCHED, "rollouts.jsonl")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def sent_event(kind: str, data: Any, *, of: str = "") -> str:
    """Return one server-sent event; `of`: the version that a browser names when it comes back."""
    name = f"id: {of}\n" if of else ""
    return f"{name}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


@dataclass
class LogReader:
    """Reads a log from its last lines on. A log that was replaced by a shorter one is read from its beginning."""

    path: Path
    at: int = -1
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def new_text(self) -> str:
        """Return what was written since the last call, as one may show it; "" for nothing or no file."""
        try:
            with reading(self.path) as stream:
                size = stream.seek(0, 2)
                if self.at < 0 and size > LOG_BEGIN_BYTES:
                    stream.seek(size - LOG_BEGIN_BYTES)
                    stream.readline()
                    self.at = stream.tell()
                self.at = 0 if self.at < 0 or size < self.at else self.at
                stream.seek(self.at)
                data = stream.read(LOG_BYTES_MAX)
        except OSError:
            return ""
        self.at += len(data)
        return shown_log(self._decoder.decode(data))


def shown_log(text: str) -> str:
    """Return text of a log without colours, and of a line that was written over (a progress bar) its last state."""
    lines = _COLOURS.sub("", text).replace("\r\n", "\n").split("\n")
    return escaped("\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines))


def log_names(path: Path) -> list[str]:
    """Return the windows that have a log, the trainer's first."""
    names = [file.stem for file in path.glob(LOG_GLOB) if not file.is_symlink()]
    return sorted(names, key=lambda name: (name != "trainer", name))


def version(path: Path, state: str) -> str:
    """Return what a page was made from: the run's state, which no file tells where it died, and what its files are.

    Take it before the files are read: what is written meanwhile then counts as newer.
    """
    files = signature(path, VERSION_NAMES)
    return ";".join([state, *(f"{size}.{time_ns}" for size, time_ns in files)])


def changed_between(old: str, new: str) -> list[str]:
    """Return which files changed from one version to another, and "state"; all of them where one is no version."""
    parts, names = (old.split(";"), new.split(";")), ("state", *VERSION_NAMES)
    if len(parts[0]) != len(parts[1]):
        return list(names)
    return [name for name, before, now in zip(names, *parts, strict=True) if before != now]


async def happenings(
    path: Path,
    log: str | None,
    told: str,
    state: Callable[[], str],
    is_ending: Callable[[], bool],
) -> AsyncIterator[str]:
    """Yield an event for each change until the browser goes, the run's directory does, or the server ends.

    `told` is the version that the page shows: what changed before it began to listen is told first. `state` returns the
    run's state now; it is asked for every STATE_S.
    """
    from starlette.concurrency import run_in_threadpool

    reader = LogReader(RunDir(path).log(log)) if log in log_names(path) else None
    told_at = asked_at = time.monotonic()
    now_state = await run_in_threadpool(state)
    yield sent_event("hello", {"log": log if reader else None})
    while not is_ending():
        messages = []
        if time.monotonic() - asked_at > STATE_S:
            now_state, asked_at = await run_in_threadpool(state), time.monotonic()
        now = version(path, now_state)
        if changed := changed_between(told, now):
            messages.append(sent_event("changed", changed, of=now))
        if reader and (text := reader.new_text()):
            messages.append(sent_event("log", text))
        if not path.is_dir():
            yield sent_event("gone", None)
            return
        if not messages and time.monotonic() - told_at > PING_S:
            messages.append(": still here\n\n")
        for message in messages:
            yield message
        told, told_at = now, time.monotonic() if messages else told_at
        await asyncio.sleep(POLL_S)
