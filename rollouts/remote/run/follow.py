"""Follow a run's files into the mirror, by byte offset. A lost connection goes on at the byte where it broke."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from rollouts.remote.errors import DeployError, MismatchError, TransportError
from rollouts.remote.host.sending import sent_program
from rollouts.remote.run.connection import Retries, RetryPolicy, RunConnection
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.mirror_files import RefusedNameError
from rollouts.view.reporter import Say

IDLE_TIMEOUT_S = 30.0  # the host says something every 5 s
_MESSAGES = ("file", "unusable", "looked", "alive", "ended", "live", "error")


def follow(
    connection: RunConnection,
    mirror: Mirror,
    on_file: Callable[[str], None],
    say: Say,
    policy: RetryPolicy,
    *,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> dict[str, Any]:
    """Follow a run until it ends, over as many connections as it takes. Returns the last message of `tail`."""
    retries = Retries(connection, say, policy)
    while True:
        try:
            for message in tail(connection, mirror, until_end=True):
                retries.worked()
                on_message(message)
                if "ended" in message:
                    return message
                if file := apply(mirror, message):
                    on_file(file)
        except TransportError as error:
            retries.wait_after(error)


def apply(mirror: Mirror, message: dict[str, Any]) -> str | None:
    """Do `mirror.apply`; a file that no run has is counted and left out."""
    try:
        return mirror.apply(message)
    except RefusedNameError as error:
        mirror.left_out[f"pieces of files {error.kind}"] += 1
        return None


def tail(connection: RunConnection, mirror: Mirror, *, until_end: bool) -> Iterator[dict[str, Any]]:
    """Yield the messages of one `tail` on the host, from where the mirror ends.

    Raises TransportError(lost) where the connection ends before the messages do.
    """
    entry = connection.entry
    options = ["--follow"] if until_end else []
    argv, program = sent_program(
        connection.python, "rollouts.worker.tail", entry.run_path, *options
    )
    offsets = json.dumps(mirror.held()).encode()
    stream = connection.transport.stream(argv, first_line=program + offsets + b"\n")
    heard = False
    try:
        for line in stream.lines(idle_timeout_s=IDLE_TIMEOUT_S):
            message = read_message(line)
            if message is None:
                mirror.left_out["lines of the connection that are not messages"] += 1
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
                f"{entry.target}: the run's files cannot be followed.",
                found=done.err[-2000:],
                started=True,
            )
        raise TransportError(f"{entry.target}: the connection ended.", lost=True)
    finally:
        stream.close()


def read_message(line: bytes) -> dict[str, Any] | None:
    """Return a line of `tail` as a message, or None for anything else: a host's shell may print lines too."""
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
