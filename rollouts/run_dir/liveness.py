"""Who is alive, by locks that the kernel frees with their holder."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from rollouts.plain_files import NotPlainFileError, appending, reading
from rollouts.run_dir.layout import FINAL_STATES, RunDir, State
from rollouts.run_dir.records import Status, out_of_sight, read_status


def hold_lock(run: RunDir) -> IO[bytes] | None:
    """Take the supervisor's lock for as long as the returned file stays open; None when another process holds it.

    The kernel releases it when the holder dies, however it dies: it is the truth about whether a run is live.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    stream = appending(run.lock)
    for _ in range(20):  # a reader in is_live() holds it for an instant
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            time.sleep(0.05)
    stream.close()
    return None


def is_live(run: RunDir) -> bool:
    """Return whether the supervisor of this run is alive on this machine."""
    try:
        stream = reading(run.lock)
    except (FileNotFoundError, NotPlainFileError):  # a pipe in its place: it is not held
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def wait_until_dead(run: RunDir) -> None:
    """Wait until no supervisor holds the lock. It does not poll: run it in a separate thread."""
    with reading(run.lock) as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)


@contextlib.contextmanager
def launching(run: RunDir, *, wait: bool = True) -> Iterator[bool]:
    """Hold a run's directory while it is launched, or looked at by a process that must not do so meanwhile.

    False without `wait` where another has it. The kernel frees it with its holder.
    """
    descriptor = os.open(run.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


START_WAIT_S = 75.0  # between the launcher's first status and the supervisor's lock
SILENT_S = 300.0  # 60 heartbeats, late by a network's cache and by clocks that differ


@dataclass(frozen=True)
class Observed:
    """What a run looks like from outside, on its own machine, now."""

    state: State  # "died" when it never reached a final state and has no supervisor, as far as can be seen from here
    exit_code: int | None
    live: bool  # a supervisor holds the lock, or is about to
    status: Status | None  # None for a file that is missing or damaged


def observe(run: RunDir) -> Observed:
    """Read a run's state, the lock before the status: a supervisor writes its last status while it holds the lock.

    A run that another machine with the same files started goes by its heartbeat: whether it has died is not known here.
    """
    live = is_live(run)
    try:
        status = read_status(run)
    except (ValueError, TypeError):  # damaged by something else than us: writes are atomic
        status = None
    if status is None:
        return Observed("starting" if live else "died", None, live, None)
    if status.state in FINAL_STATES:
        return Observed(status.state, status.exit_code, live, status)
    # either way: the time of day may have been set meanwhile
    waiting = not run.lock.exists() and abs(time.time() - status.updated_at) < START_WAIT_S
    if live or waiting:
        return Observed(status.state, None, True, status)
    if status.state == "queued" and run.slurm_job.exists():  # Slurm starts its supervisor
        return Observed("queued", None, True, status)
    if out_of_sight(run):
        heard = time.time() - status.updated_at < SILENT_S
        return Observed(status.state if heard else "silent", None, heard, status)
    return Observed("died", None, False, status)
