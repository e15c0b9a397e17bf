"""Bring a run's results here, verified. Each thing is tried by itself, and all failures are told together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from rollouts.remote.errors import (
    DeployError,
    MismatchError,
    Problem,
    TransportError,
    UnreachableError,
)
from rollouts.remote.local_faults import os_problem
from rollouts.remote.run.checkpoints import bytes_here, drop_partial, pull_checkpoint
from rollouts.remote.run.connection import RetryPolicy, RunConnection, with_retries
from rollouts.remote.run.follow import apply, tail
from rollouts.remote.run.mirror import Mirror, pull_files
from rollouts.remote.run.mirror_files import is_checkpoint
from rollouts.remote.run.wanted import left_note
from rollouts.view.fold import View, fold
from rollouts.view.reporter import Say, silent

CHECKPOINTS_MAX = 100_000  # that a host's listing may name
ODD_CHECKPOINTS = "checkpoints outside of checkpoints/<stage>/step_<number>"
T = TypeVar("T")


@dataclass
class _Pulling:
    """Try independent things; collect the failures, and raise them at the end."""

    connection: RunConnection
    say: Say
    policy: RetryPolicy
    problems: list[Problem] = field(default_factory=list)

    def attempt(self, action: Callable[[], T], *, came: Callable[[], int] = lambda: 0) -> T | None:
        """Return what `action` returns, or None where it failed alone. Raises what stops all the others too."""
        try:
            return with_retries(action, self.connection, self.say, self.policy, came=came)
        except (TransportError, UnreachableError, MismatchError):
            raise
        except DeployError as error:
            self.problems += error.problems
        except OSError as error:
            if (problem := os_problem(error)) not in self.problems:
                self.problems.append(problem)
        return None

    def finish(self, mirror: Mirror, view: View) -> None:
        for note in mirror.left_out_notes(rows=view.malformed):
            self.say("note", note)
        if self.problems:
            raise DeployError.of(self.problems, started=True)


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: the run's state, or "live", and the checkpoints that were left on the host, as asked."""

    state: str
    left: tuple[str, ...]


def pull(connection: RunConnection, say: Say = silent, policy: RetryPolicy | None = None) -> Pulled:
    """Bring everything here that there is now, verified.

    Raises DeployError with all that failed, after everything was tried.
    """
    pulling = _Pulling(connection, say, policy or RetryPolicy())
    mirror = Mirror(connection.entry.mirror)
    state = pulling.attempt(lambda: _pull_once(connection, mirror)) or ""
    if state != "live":
        _pull_files(pulling, mirror)
    return Pulled(state, _pull_checkpoints(pulling, mirror))


def _pull_once(connection: RunConnection, mirror: Mirror) -> str:
    state = ""
    for message in tail(connection, mirror, until_end=False):
        state = "live" if "live" in message else str(message.get("state", state))
        apply(mirror, message)
    return state


def final_pull(
    connection: RunConnection, say: Say = silent, policy: RetryPolicy | None = None
) -> tuple[str, ...]:
    """Compare by checksum after the run's end, and bring what is missing. Raises DeployError with all that failed.

    Returns the checkpoints that were left on the host, as asked.
    """
    pulling = _Pulling(connection, say, policy or RetryPolicy())
    mirror = Mirror(connection.entry.mirror)
    _pull_files(pulling, mirror)
    return _pull_checkpoints(pulling, mirror)


def _pull_files(pulling: _Pulling, mirror: Mirror) -> None:
    connection = pulling.connection
    options = connection.wanted.rsync_options
    bring = partial(
        pull_files, connection.transport, connection.entry.run_path, mirror.run, options
    )
    if refused := pulling.attempt(bring):
        mirror.left_out["files that no run has, or that are not plain files"] += len(refused)


def _pull_checkpoints(pulling: _Pulling, mirror: Mirror) -> tuple[str, ...]:
    """Bring the checkpoints; the last part of a pull, which says what was left out and raises for what failed."""
    connection, view, removed = pulling.connection, View(), set()
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
        listed = pulling.attempt(partial(listed_checkpoints, connection)) or []
        paths += [path for path in listed if path not in paths and path not in removed]
    chosen, left = connection.wanted.choose(paths)
    for path in chosen:
        bring = partial(
            pull_checkpoint, connection.transport, connection.entry.run_path, mirror.run, path
        )
        options = connection.wanted.rsync_options
        pulling.attempt(
            partial(bring, rsync_options=options), came=partial(bytes_here, mirror.run, path)
        )
    left = [path for path in left if not (mirror.run.path / path).is_dir()]
    if left:
        pulling.say("note", left_note(connection.entry.run_id, left))
    pulling.finish(mirror, view)
    return tuple(left)


def listed_checkpoints(connection: RunConnection) -> list[str]:
    """Return the completed checkpoints that the host lists."""
    script = 'for m in checkpoints/*/step_*/manifest.json; do [ -f "$m" ] && echo "${m%/manifest.json}"; done; true'
    done = connection.transport.run(
        ["sh", "-c", script], cwd=connection.entry.run_path, timeout_s=60
    )
    return [line for line in done.out.splitlines()[:CHECKPOINTS_MAX] if is_checkpoint(line)]
