"""Follow a run from here until it ends: its bytes into the mirror, its rows to a reporter, its checkpoints behind.

A lost connection is made again, with growing pauses, and goes on at the byte where it broke. Nothing here changes the
run: whoever stops watching only stops watching.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.mirror import CheckpointPuller, Mirror, drop_partial, pull_checkpoint, pull_files
from rollouts.remote.registry import Entry
from rollouts.remote.sending import sent_program
from rollouts.remote.transport import Transport
from rollouts.remote.view import View, fold

IDLE_TIMEOUT_S = 30.0  # the host says something every 5 s
LINE_FILES = ("events.jsonl", "metrics.jsonl", "eval.jsonl")


@dataclass(frozen=True)
class Patience:
    """How long a lost connection is tried again."""

    total_s: float = 900.0
    pause_max_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = field(default=random.random)  # [0, 1): many watchers do not come back as one

    def pause_s(self, failures: int) -> float:
        return float(min(self.pause_max_s, 0.5 * 2**failures) * (0.5 + self.jitter()))


@dataclass(frozen=True)
class Link:
    """A run, and the way to its files."""

    entry: Entry
    python: str  # the host's
    transport: Transport


class Reporter(Protocol):
    """Where what happens is shown."""

    def say(self, phase: str, text: str) -> None:
        """Something that deploy itself does, or a notice."""
        ...

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        """A new row of one of LINE_FILES, and the view after it."""
        ...

    def close(self) -> None:
        """The display is over; plain printing may follow."""
        ...


@dataclass(frozen=True)
class Result:
    """How the run ended, and what is here of it."""

    state: str
    exit_code: int | None
    view: View


def watch(link: Link, reporter: Reporter, patience: Patience) -> Result:
    """Follow a run to its end. Raises DeployError, or KeyboardInterrupt to detach."""
    entry = link.entry
    mirror = Mirror(entry.mirror)
    puller = CheckpointPuller(link.transport, entry.run_path, mirror.run)
    view = View()
    for file in LINE_FILES:  # what came before: seen, not shown again
        for row in mirror.rows(file):
            view = fold(view, file, row)
    for path in view.checkpoints:
        puller.add(path)
    if view.phases:
        reporter.say("attach", f"{entry.run_id} is at stage {view.stage or 'bootstrap'}, step {view.step}")

    def on_file(file: str) -> None:
        nonlocal view
        if file in LINE_FILES:
            for row in mirror.rows(file):
                view = fold(view, file, row)
                reporter.row(file, row, view)
                if row.get("kind") == "checkpoint":
                    puller.add(row["path"])

    ended = follow(link, mirror, on_file, reporter.say, patience)
    puller.finish()
    return Result(state=ended["state"], exit_code=ended["exit_code"], view=view)


def follow(
    link: Link,
    mirror: Mirror,
    on_file: Callable[[str], None],
    say: Callable[[str, str], None],
    patience: Patience,
) -> dict[str, Any]:
    """The `tail` of a run until it ended, over as many connections as it takes; its last message."""
    entry, failures, last_word = link.entry, 0, patience.clock()
    while True:
        try:
            for message in tail(link, mirror, follow=True):
                if failures:
                    say("reconnect", f"connected with {entry.target} again")
                failures, last_word = 0, patience.clock()
                if "ended" in message:
                    return message
                if file := mirror.apply(message):
                    on_file(file)
        except TransportError as error:
            if not error.lost:
                raise
            failures += 1
            silent_s = patience.clock() - last_word
            if silent_s > patience.total_s:
                raise DeployError(
                    f"{entry.target} cannot be reached for {silent_s:.0f} s; the run goes on there.",
                    found=str(error),
                    fix=f"deploy attach {entry.run_id}",
                    started=True,
                ) from None
            pause_s = patience.pause_s(failures)
            say("reconnect", f"{str(error).rstrip('.')}. Next try in {pause_s:.1f} s")
            link.transport.close()
            patience.sleep(pause_s)


def tail(link: Link, mirror: Mirror, *, follow: bool) -> Iterator[dict[str, Any]]:
    """Messages of one `tail` on the host, from where the mirror ends. Ends early only by TransportError(lost)."""
    entry, transport = link.entry, link.transport
    options = ["--follow"] if follow else []
    argv, program = sent_program(link.python, "rollouts.worker.tail", entry.run_path, *options)
    stream = transport.stream(argv, first_line=program + json.dumps(mirror.offsets()).encode() + b"\n")
    heard = False
    try:
        for line in stream.lines(idle_timeout_s=IDLE_TIMEOUT_S):
            message = _message(line)
            if message is None:
                continue
            if "error" in message:
                raise DeployError(
                    f"{entry.run_id}: what is here does not fit what is on {entry.target}.",
                    found=message["error"],
                    fix=f"move {entry.local_dir} away, then: deploy pull {entry.run_id}",
                    started=True,
                )
            heard = True
            yield message
            if "ended" in message or "live" in message:
                return
        done = stream.end()
        if done.returncode > 0 and not heard:
            raise DeployError(
                f"{entry.target}: the run's files cannot be followed.", found=done.err[-2000:], started=True
            )
        raise TransportError(f"{entry.target}: the connection ended.", lost=True)
    finally:
        stream.close()


def _message(line: bytes) -> dict[str, Any] | None:
    """One line of `tail`; None for what something else on the host printed in between.

    Where that tore one of tail's own lines, the next one does not fit the mirror, and the connection is made anew.
    """
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def pull(link: Link) -> str:
    """Bring everything here that there is now, verified; the run's state, or "live". Raises DeployError."""
    mirror, state = Mirror(link.entry.mirror), ""
    for message in tail(link, mirror, follow=False):
        state = "live" if "live" in message else str(message.get("state", state))
        mirror.apply(message)
    pull_checkpoints(link) if state == "live" else final_pull(link)
    return state


def pull_checkpoints(link: Link) -> None:
    """Every checkpoint that the mirror's events name, whole and verified; not those that the run has removed since."""
    mirror, view = Mirror(link.entry.mirror), View()
    for row in mirror.rows("events.jsonl"):
        view = fold(view, "events.jsonl", row)
        if row.get("kind") == "checkpoint_removed":
            drop_partial(mirror.run, row["path"])
    for path in view.checkpoints:
        pull_checkpoint(link.transport, link.entry.run_path, mirror.run, path)


def final_pull(link: Link) -> None:
    """After the end: compare by checksum, and bring what is missing."""
    pull_files(link.transport, link.entry.run_path, link.entry.mirror)
    pull_checkpoints(link)
