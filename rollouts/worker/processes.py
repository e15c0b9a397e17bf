"""Which processes belong to a run, and how they are ended. Standard library only; reads Linux's /proc.

Every process of a run starts with two variables in its environment, which its descendants inherit whatever session or
group they move to: the run's id and the window it came from. They are the run's mark: nothing without it is ever
signalled, so neither a reused process id nor a stranger in a recorded group is hit.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from rollouts.run_dir import RUN_ID_VARIABLE

WINDOW_VARIABLE = "ROLLOUTS_WINDOW"  # "<stage>-<window>"; the window wrappers themselves have the run's id alone
SUPERVISOR_STAGE = "run"  # the supervisor's window belongs to no stage
SUPERVISOR_WINDOW = "supervisor"
STOPPED_CODE = 143  # the exit code of a stopped run, as a shell reports SIGTERM
KILL_WAIT_S = 10.0  # how long the kernel may take over a SIGKILL
POLL_S = 0.05


def window_mark(stage: str, window: str) -> str:
    return f"{stage}-{window}"


def marked_processes(run_id: str, windows: Collection[str] | None = None) -> list[int]:
    """Ids of the live processes that carry the run's mark, without the caller.

    `windows` (of `window_mark`) narrows it to what came from those; None takes all, the wrappers too. A zombie has
    no environment left and is not counted.
    """
    run_entry = f"{RUN_ID_VARIABLE}={run_id}".encode()
    window_entries = None if windows is None else {f"{WINDOW_VARIABLE}={name}".encode() for name in windows}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            entries = Path("/proc", name, "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if run_entry in entries and (window_entries is None or not window_entries.isdisjoint(entries)):
            found.append(int(name))
    return found


def end_marked(
    run_id: str,
    windows: Collection[str] | None,
    *,
    grace_s: float,
    tick: Callable[[], None] = lambda: None,
) -> list[int]:
    """Ask the marked processes to end, kill after `grace_s` what is left, and see that they are gone.

    `tick` is called about twenty times a second. Returns the ids that survived SIGKILL for KILL_WAIT_S: none, unless
    the kernel holds them.
    """
    kill_at = time.monotonic() + grace_s
    give_up_at = kill_at + KILL_WAIT_S
    asked: set[int] = set()
    while remaining := marked_processes(run_id, windows):
        now = time.monotonic()
        if now > give_up_at:
            return remaining
        for pid in remaining:
            if now >= kill_at:
                send_signal(pid, signal.SIGKILL)
            elif pid not in asked:
                send_signal(pid, signal.SIGTERM)
        asked.update(remaining)
        tick()
        time.sleep(POLL_S)
    return []


def send_signal(pid: int, signum: int) -> None:
    """Signal one process; that it ended meanwhile is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: with the id, its identity. None once it has ended.

    A zombie has ended.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Is it held by SIGSTOP or its like?"""
    fields = _stat(pid)
    return fields is not None and fields[0] == "T"


def _stat(pid: int) -> list[str] | None:
    """/proc/pid/stat from field 3 on; None for a process that is gone.

    Source: proc(5): fields 3 (state) and 22 (starttime); the command's name before them is in parentheses and may hold
    anything.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def listens(port: int, pids: Collection[int]) -> bool:
    """Does one of these processes hold a socket that listens on `port`?

    Source: proc(5), /proc/net/tcp: fields 1 (local address:port, hexadecimal), 3 (state, 0A is LISTEN) and 9 (inode).
    """
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    return any(not sockets.isdisjoint(_open_files(pid)) for pid in pids)


def _open_files(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):  # ended meanwhile
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(os.readlink(entry.path))
    return found
