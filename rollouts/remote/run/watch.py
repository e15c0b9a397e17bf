"""Follow a run from here until it ends: its bytes into the mirror, its rows to a reporter, its checkpoints behind.

A lost connection is made again, with growing pauses, and goes on at the byte where it broke; so is one that is lost
during the last pull. Nothing here changes the run: whoever stops watching only stops watching.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from rollouts.remote.errors import DeployError, MismatchError, Problem, TransportError, UnreachableError
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import Transport
from rollouts.remote.local_faults import os_problem
from rollouts.remote.run.mirror import CheckpointPuller, Mirror, drop_partial, pull_checkpoint, pull_files
from rollouts.remote.run.mirror_files import RefusedNameError, is_checkpoint
from rollouts.remote.run.registry import Entry
from rollouts.run_dir import read_status
from rollouts.view.fold import View, fold
from rollouts.view.reporter import Reporter
from rollouts.view.row_order import RowOrder

IDLE_TIMEOUT_S = 30.0  # the host says something every 5 s
LINE_FILES = ("events.jsonl", "metrics.jsonl", "eval.jsonl")
CHECKPOINTS_MAX = 100_000  # that a host's listing may name
ODD_CHECKPOINTS = "checkpoints outside of checkpoints/<stage>/step_<number>"
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a lost connection is tried again."""

    total_s: float = 900.0
    pause_max_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = field(default=random.random)  # [0, 1): many watchers do not come back as one

    def pause_s(self, failures: int) -> float:
        return float(min(self.pause_max_s, 0.5 * 2 ** min(failures, 20)) * (0.5 + self.jitter()))


@dataclass(frozen=True)
class Link:
    """A run, and the way to its files."""

    entry: Entry
    python: str  # the host's
    transport: Transport


Say = Callable[[str, str], None]  # a reporter's `say`


def _silent(phase: str, text: str) -> None:
    return None


@dataclass(frozen=True)
class Result:
    """How the run ended, and what is here of it."""

    state: str
    exit_code: int | None
    view: View
    notes: tuple[str, ...] = ()  # what was left out of what the host sent


class _Retries:
    """Failures since the last success, and the pause before the next try."""

    def __init__(self, link: Link, say: Say, patience: Patience) -> None:
        self.link, self.say, self.patience = link, say, patience
        self.failures, self.last_word = 0, patience.clock()

    def worked(self) -> None:
        if self.failures:
            self.say("reconnect", f"connected with {self.link.entry.target} again")
        self.failures, self.last_word = 0, self.patience.clock()

    def wait_after(self, error: TransportError) -> None:
        """Pause; then it may be tried again. Raises DeployError once that went on for too long."""
        if not error.lost:
            raise error
        entry = self.link.entry
        self.failures += 1
        silent_s = self.patience.clock() - self.last_word
        if silent_s > self.patience.total_s:
            raise UnreachableError(
                f"{entry.target} cannot be reached for {silent_s:.0f} s; the run goes on there.",
                found=str(error),
                fix=f"deploy attach {entry.run_id}",
                started=True,
            ) from None
        pause_s = self.patience.pause_s(self.failures)
        self.say("reconnect", f"{str(error).rstrip('.')}. Next try in {pause_s:.1f} s")
        self.link.transport.close()
        self.patience.sleep(pause_s)


class _Watching:
    """The rows seen so far, folded, and what each of them starts."""

    def __init__(self, mirror: Mirror, reporter: Reporter, add: Callable[[str], None]) -> None:
        self.mirror, self.reporter, self._add = mirror, reporter, add
        self.view = View()
        self._order = RowOrder(self._show)
        self._doing = ""

    def look_back(self) -> None:
        """What came before: seen, not shown again."""
        for file in LINE_FILES:
            for row in self.mirror.rows(file):
                self.view = fold(self.view, file, row)
        for path in self.view.checkpoints:
            self._add_checkpoint(path)

    def on_file(self, file: str) -> None:
        if file in LINE_FILES:
            for row in self.mirror.rows(file):
                self._order.add(file, row)
        elif file == "status.json":
            self._doing = _message_of(self.mirror)
            self.reporter.alive(self._doing)

    def on_message(self, message: dict[str, Any]) -> None:
        """The host is alive, or the run ended."""
        if "file" not in message:
            self._order.flush()
        if "alive" in message:
            self.reporter.alive(self._doing)

    def flush(self) -> None:
        self._order.flush()

    def _show(self, file: str, row: dict[str, Any]) -> None:
        self.view = fold(self.view, file, row)
        self.reporter.row(file, row, self.view)
        if file == "events.jsonl" and row.get("kind") == "checkpoint":
            self._add_checkpoint(row.get("path"))

    def _add_checkpoint(self, path: object) -> None:
        if is_checkpoint(path):
            self._add(str(path))


def _message_of(mirror: Mirror) -> str:
    """What the run's status says that it does; "" where that cannot be read."""
    try:
        status = read_status(mirror.run)
    except (ValueError, TypeError, OSError, RecursionError):
        return ""
    return str(status.message) if status else ""


def watch(link: Link, reporter: Reporter, patience: Patience) -> Result:
    """Follow a run to its end. Raises DeployError, or KeyboardInterrupt to detach."""
    entry = link.entry
    mirror = Mirror(entry.mirror)
    puller = CheckpointPuller(link.transport, entry.run_path, mirror.run, reporter.say, patience.pause_s)
    watching = _Watching(mirror, reporter, puller.add)
    watching.look_back()
    if watching.view.phases:
        reporter.say(
            "attach", f"{entry.run_id} is at stage {watching.view.stage or 'bootstrap'}, step {watching.view.step}"
        )
    try:
        ended = follow(link, mirror, watching.on_file, reporter.say, patience, on_message=watching.on_message)
    finally:
        watching.flush()
    puller.finish()
    view = watching.view
    return Result(state=ended["state"], exit_code=ended["exit_code"], view=view, notes=left_out_notes(mirror, view))


def left_out_notes(mirror: Mirror, view: View | None = None) -> tuple[str, ...]:
    """One note of all that could not be used, with counts; () for nothing."""
    counts = Counter(mirror.left_out)
    if view is not None and view.malformed:
        counts["rows that lack a field, or have a wrong one"] += view.malformed
    if not counts:
        return ()
    return ("left out of what the host sent: " + "; ".join(f"{count} {what}" for what, count in counts.items()),)


def follow(
    link: Link,
    mirror: Mirror,
    on_file: Callable[[str], None],
    say: Say,
    patience: Patience,
    *,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> dict[str, Any]:
    """The `tail` of a run until it ended, over as many connections as it takes; its last message."""
    retries = _Retries(link, say, patience)
    while True:
        try:
            for message in tail(link, mirror, follow=True):
                retries.worked()
                on_message(message)
                if "ended" in message:
                    return message
                if file := apply(mirror, message):
                    on_file(file)
        except TransportError as error:
            retries.wait_after(error)


def apply(mirror: Mirror, message: dict[str, Any]) -> str | None:
    """`mirror.apply`, where a file that no run has is counted and left out."""
    try:
        return mirror.apply(message)
    except RefusedNameError as error:
        mirror.left_out[f"pieces of files {error.kind}"] += 1
        return None


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
                mirror.left_out["lines of the connection that are no message"] += 1
                continue
            if "error" in message:
                raise MismatchError(
                    f"{entry.run_id}: what is here does not fit what is on {entry.target}.",
                    found=str(message["error"]),
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


_MESSAGES = ("file", "unusable", "alive", "ended", "live", "error")


def _message(line: bytes) -> dict[str, Any] | None:
    """A line of `tail`, else None: what a host's shell prints, for example."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or not any(key in message for key in _MESSAGES):
        return None
    if "ended" in message:
        state, code = message.get("state"), message.get("exit_code")
        message["state"] = state[:40] if isinstance(state, str) else "died"
        message["exit_code"] = code if type(code) is int and 0 <= code <= 255 else None
    return message


# --- pulling --------------------------------------------------------------------------------------------------------


def patiently(action: Callable[[], T], link: Link, say: Say, patience: Patience) -> T:
    """`action`, again after every lost connection. Raises DeployError once that went on for too long."""
    retries = _Retries(link, say, patience)
    while True:
        try:
            return action()
        except TransportError as error:
            retries.wait_after(error)


@dataclass
class _Pulling:
    """Independent things, each tried; what failed is collected and told at the end."""

    link: Link
    say: Say
    patience: Patience
    problems: list[Problem] = field(default_factory=list)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """None where it failed for a reason of its own. Raises what stops all the others too."""
        try:
            return patiently(action, self.link, self.say, self.patience)
        except (TransportError, UnreachableError, MismatchError):
            raise
        except DeployError as error:
            self.problems += error.problems
        except OSError as error:
            if (problem := os_problem(error)) not in self.problems:
                self.problems.append(problem)
        return None

    def finish(self, mirror: Mirror, view: View) -> None:
        for note in left_out_notes(mirror, view):
            self.say("note", note)
        if self.problems:
            raise DeployError.of(self.problems, started=True)


def pull(link: Link, say: Say = _silent, patience: Patience | None = None) -> str:
    """Bring everything here that there is now, verified; the run's state, or "live".

    Raises DeployError with all that failed, after everything was tried.
    """
    pulling = _Pulling(link, say, patience or Patience())
    mirror = Mirror(link.entry.mirror)
    state = pulling.attempt(lambda: _pull_once(link, mirror)) or ""
    if state != "live":
        _pull_files(pulling, mirror)
    _pull_checkpoints(pulling, mirror)
    return state


def _pull_once(link: Link, mirror: Mirror) -> str:
    state = ""
    for message in tail(link, mirror, follow=False):
        state = "live" if "live" in message else str(message.get("state", state))
        apply(mirror, message)
    return state


def final_pull(link: Link, say: Say = _silent, patience: Patience | None = None) -> None:
    """After the end: compare by checksum, and bring what is missing. Raises DeployError with all that failed."""
    pulling = _Pulling(link, say, patience or Patience())
    mirror = Mirror(link.entry.mirror)
    _pull_files(pulling, mirror)
    _pull_checkpoints(pulling, mirror)


def pull_checkpoints(link: Link) -> None:
    """Every checkpoint that the mirror's events name, whole and verified; not those that the run has removed since."""
    _pull_checkpoints(_Pulling(link, _silent, Patience()), Mirror(link.entry.mirror))


def _pull_files(pulling: _Pulling, mirror: Mirror) -> None:
    link = pulling.link
    refused = pulling.attempt(lambda: pull_files(link.transport, link.entry.run_path, mirror.run)) or []
    if refused:
        mirror.left_out["files that no run has, or that are no plain files"] += len(refused)


def _pull_checkpoints(pulling: _Pulling, mirror: Mirror) -> None:
    """The last part of a pull: says what was left out, and raises for what failed."""
    link, view, removed = pulling.link, View(), set()
    for row in mirror.rows("events.jsonl"):
        view = fold(view, "events.jsonl", row)
        if row.get("kind") == "checkpoint_removed":
            removed.add(str(row.get("path")))
    for path in filter(is_checkpoint, removed):
        pulling.attempt(partial(drop_partial, mirror.run, path))
    paths = [path for path in view.checkpoints if is_checkpoint(path)]
    if odd := len(view.checkpoints) - len(paths):
        mirror.left_out[ODD_CHECKPOINTS] += odd
    if mirror.left_out or view.malformed:  # a line that cannot be read may have named one
        listed = pulling.attempt(partial(_listed_checkpoints, link)) or []
        paths += [path for path in listed if path not in paths and path not in removed]
    for path in paths:
        pulling.attempt(partial(pull_checkpoint, link.transport, link.entry.run_path, mirror.run, path))
    pulling.finish(mirror, view)


def _listed_checkpoints(link: Link) -> list[str]:
    """The completed checkpoints that lie on the host."""
    script = 'for m in checkpoints/*/step_*/manifest.json; do [ -f "$m" ] && echo "${m%/manifest.json}"; done; true'
    done = link.transport.run(["sh", "-c", script], cwd=link.entry.run_path, timeout_s=60)
    return [line for line in done.out.splitlines()[:CHECKPOINTS_MAX] if is_checkpoint(line)]
