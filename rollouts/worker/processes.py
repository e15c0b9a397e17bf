"""Which processes belong to a run, and how they are ended. Standard library only; reads Linux's /proc.

Every process of a run starts with three variables in its environment, which its descendants inherit whatever session
or group they move to: the run's id, its directory, and the window it came from. They are the run's mark. The directory
tells runs of one id in two homes apart. Processes of an older version have the id alone: they count as the run's where
its launch.json is an older version's too, or gone. A process that dropped its
environment belongs to the run by descent: each window's wrapper adopts the orphans below it (`adopt_orphans`), so the
chain of parents leads to a marked process for as long as the wrapper lives. Nothing else is ever signalled, so neither
a reused process id nor a stranger in a recorded group is hit.
"""

import contextlib
import ctypes
import ipaddress
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rollouts.run_dir import RUN_ID_VARIABLE, RUN_PATH_VARIABLE, RunDir, read_launch_host

WINDOW_VARIABLE = (
    "ROLLOUTS_WINDOW"  # "<stage>-<window>"; the window wrappers themselves have no such variable
)
SUPERVISOR_STAGE = "run"  # the supervisor's window belongs to no stage
SUPERVISOR_WINDOW = "supervisor"
STOPPED_CODE = 143  # the exit code of a stopped run, as a shell reports SIGTERM
KILL_WAIT_S = 10.0  # how long the kernel may take over a SIGKILL
SUPERVISOR_MARGIN_S = 20.0  # beyond its windows' grace: the supervisor's own bookkeeping
POLL_S = 0.05
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def window_mark(stage: str, window: str) -> str:
    return f"{stage}-{window}"


def run_marks(run: RunDir) -> dict[str, str]:
    """Return the variables by which a run knows its processes, less the window's."""
    return {RUN_ID_VARIABLE: run.run_id, RUN_PATH_VARIABLE: run.real_path}


@dataclass(frozen=True)
class Scan:
    """One look at everything that lives on this machine: whose child it is, and its environment."""

    parents: Mapping[int, int]
    environments: Mapping[int, frozenset[bytes]]


def scan() -> Scan:
    """Read /proc once: it takes long where much runs, so one look serves all questions that are asked at a time."""
    parents = _parents()
    return Scan(parents, {pid: _environment(pid) for pid in parents})


def marked_processes(
    run: RunDir,
    windows: Collection[str] | None = None,
    *,
    ancestors: Collection[int] = (),
    seen: Scan | None = None,
) -> list[int]:
    """Ids of the live processes that carry the run's mark, and of all that descend from them, without the caller.

    `windows` (of `window_mark`) narrows it to what came from those; None takes all, the wrappers too. What descends
    from `ancestors` belongs to it as well. A zombie has ended and is not counted, nor is what another run marked.
    `seen`: a look that was taken already.
    """
    seen = seen or scan()
    window_entries = (
        None if windows is None else {f"{WINDOW_VARIABLE}={name}".encode() for name in windows}
    )
    own, strangers = _sorted_out(run, seen)
    chosen = {
        pid
        for pid in own
        if window_entries is None or not window_entries.isdisjoint(seen.environments.get(pid, ()))
    }
    roots = chosen | set(ancestors)
    found = (roots & seen.parents.keys()) | _below(roots, seen.parents, without=strangers)
    return sorted(found - set(ancestors) - {os.getpid()})


def descendants(pid: int, run: RunDir, *, seen: Scan | None = None) -> dict[int, int]:
    """Return what of the run descends from a process now, as {id: start ticks}, to know it again once its parents are
    gone."""
    seen = seen or scan()
    _, strangers = _sorted_out(run, seen)
    found = {child: start_ticks(child) for child in _below({pid}, seen.parents, without=strangers)}
    return {child: ticks for child, ticks in found.items() if ticks is not None}


def _sorted_out(run: RunDir, seen: Scan) -> tuple[set[int], set[int]]:
    """(those that carry the run's mark, those that carry another run's)."""
    run_id, run_path = (f"{name}={value}".encode() for name, value in run_marks(run).items())
    any_id, any_path = f"{RUN_ID_VARIABLE}=".encode(), f"{RUN_PATH_VARIABLE}=".encode()
    older = read_launch_host(run) is None  # started by an older version, or its directory is gone
    own: set[int] = set()
    strangers: set[int] = set()
    for pid, entries in seen.environments.items():
        if run_id in entries:
            path_entries = [entry for entry in entries if entry.startswith(any_path)]
            (own if run_path in path_entries or (older and not path_entries) else strangers).add(
                pid
            )
        elif any(entry.startswith(any_id) for entry in entries):
            strangers.add(pid)
    return own, strangers


def _parents() -> dict[int, int]:
    """{process id: its parent's} of everything that lives."""
    found = {}
    for name in os.listdir("/proc"):
        fields = _stat(int(name)) if name.isdigit() else None
        if fields is not None and fields[0] not in "ZX":
            found[int(name)] = int(fields[1])
    return found


def _environment(pid: int) -> frozenset[bytes]:
    try:
        return frozenset(Path("/proc", str(pid), "environ").read_bytes().split(b"\0"))
    except OSError:  # gone meanwhile, or another user's
        return frozenset()


def _below(roots: set[int], parents: Mapping[int, int], *, without: set[int]) -> set[int]:
    """Return all descendants of `roots`; what lies below a process of `without` is another's."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found and child not in without:
                found.add(child)
                waiting.append(child)
    return found


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that descent never breaks below this process.

    Whoever calls it has to `reap` what it adopted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:  # no kernel of the last ten years
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap(*, spare: int | None = None) -> None:
    """Take the exit codes of adopted children that have ended; `spare` is waited for by somebody else."""
    with contextlib.suppress(ChildProcessError):  # there are no children
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == spare:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def end_marked(
    run: RunDir,
    windows: Collection[str] | None,
    *,
    grace_s: float,
    tick: Callable[[], None] = lambda: None,
    ancestors: Collection[int] = (),
    family: Mapping[int, int] | None = None,
) -> list[int]:
    """Ask the marked processes to end, kill after `grace_s` what is left, and see that they are gone.

    What was found once is ended even where its parents end first; `family` (of `descendants`) was found before.
    `tick` is called about twenty times a second. Returns the ids that survived SIGKILL for KILL_WAIT_S: none, unless
    the kernel holds them.
    """
    kill_at = time.monotonic() + grace_s
    give_up_at = kill_at + KILL_WAIT_S
    asked: set[int] = set()
    known: set[tuple[int, int | None]] = set((family or {}).items())
    while True:
        known |= {
            (pid, start_ticks(pid)) for pid in marked_processes(run, windows, ancestors=ancestors)
        }
        remaining = sorted(
            pid for pid, ticks in known if ticks is not None and start_ticks(pid) == ticks
        )
        if not remaining:
            return []
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


def send_signal(pid: int, signum: int) -> None:
    """Signal one process; that it ended meanwhile is fine. One that became another user's is told by its id later."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signum)


def start_ticks(pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot: with the id, its identity. None once it has ended.

    A zombie has ended.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Is it held by SIGSTOP or its like?"""
    fields = _stat(pid)
    return fields is not None and fields[0] == "T"


@dataclass(frozen=True)
class ProcessUsage:
    """What a process has used so far."""

    ticks: int  # of the clock, on a CPU
    memory_bytes: int  # resident now, shared pages included


def process_usage(pid: int) -> ProcessUsage | None:
    """Return what a process uses; None once it has ended.

    Source: proc(5), /proc/pid/stat: fields 14 and 15 (utime, stime) and 24 (rss, in pages).
    """
    fields = _stat(pid)
    if fields is None or fields[0] in "ZX":
        return None
    return ProcessUsage(
        int(fields[11]) + int(fields[12]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    )


def _stat(pid: int) -> list[str] | None:
    """/proc/pid/stat from field 3 on; None for a process that is gone.

    Source: proc(5): fields 3 (state) and 22 (starttime); the command's name before them is in parentheses and may hold
    anything.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


@dataclass(frozen=True)
class Listener:
    """A TCP socket that waits for connections, and a process that holds it."""

    address: str
    port: int
    pid: int


def listens(port: int, pids: Collection[int]) -> bool:
    """Does one of these processes hold a socket that listens on `port`?"""
    return any(found.port == port for found in listeners(pids))


def listeners(pids: Collection[int], *, beyond_loopback: bool = False) -> list[Listener]:
    """Return the sockets on which these processes listen; with `beyond_loopback` only those that other machines
    reach."""
    sockets = {
        inode: place
        for inode, place in _listening().items()
        if not (beyond_loopback and _is_loopback(ipaddress.ip_address(place[0])))
    }
    if not sockets:
        return []
    held = ((pid, inode) for pid in pids for inode in sorted(_open_files(pid) & sockets.keys()))
    return [Listener(*sockets[inode], pid) for pid, inode in held]


def _listening() -> dict[str, tuple[str, int]]:
    """{"socket:[inode]": (address, port)} of every listening TCP socket of this machine.

    Source: proc(5), /proc/net/tcp: fields 1 (local address:port, hexadecimal, the address in 32-bit words of the
    machine's byte order), 3 (state, 0A is LISTEN) and 9 (inode).
    """
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].partition(":")
                if fields[3] == "0A":
                    found[f"socket:[{fields[9]}]"] = (_address(address), int(port, 16))
    return found


def _address(text: str) -> str:
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed))


def _is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _open_files(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):  # ended meanwhile
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(os.readlink(entry.path))
    return found
