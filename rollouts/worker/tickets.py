"""The line of runs that wait for their turn on this machine: a ticket each, locked by the supervisor that waits.

    <home>/queue/<machine>/<number>.<run id>      an empty file

The lowest number whose lock is held comes first. The kernel frees a lock with its holder, however that ends, so a dead
waiter's ticket blocks nobody. Machines that share a home each have a line of their own. Standard library only.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollouts.plain_files import open_plain
from rollouts.run_dir import host_identity

ORDER_LOCK, NEW = ".order.lock", ".new"  # hidden: no tickets


@dataclass(frozen=True)
class Ticket:
    """A place in the line."""

    path: Path
    number: int
    run_id: str

    def is_held(self) -> bool:
        """Return whether the supervisor that drew it is alive, and still waits."""
        with _opened(self.path) as descriptor:
            return descriptor is not None and not _try_lock(descriptor)


@dataclass(frozen=True)
class OwnTicket(Ticket):
    """This process's place in the line, until `drop`, or its end."""

    descriptor: int

    def drop(self) -> None:
        """Leave the line."""
        self.path.unlink(missing_ok=True)  # first: nobody finds it without its lock
        os.close(self.descriptor)


def draw(home: Path, run_id: str) -> OwnTicket:
    """Take the next number. Raises OSError, as where the disk is full; nobody is behind this run then."""
    directory = _directory(home)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(directory / ORDER_LOCK):
        standing = _tickets(directory)
        for ticket in standing:
            if not ticket.is_held():
                ticket.path.unlink(missing_ok=True)
        number = max((ticket.number for ticket in standing), default=0) + 1
        new = directory / NEW
        descriptor = open_plain(new, os.O_RDWR | os.O_CREAT, 0o600)
        # before it has its name: whoever finds it finds it locked
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        path = directory / f"{number:09d}.{run_id}"
        new.rename(path)
    return OwnTicket(path, number, run_id, descriptor)


def in_line(home: Path) -> list[Ticket]:
    """Return the tickets of those that wait now, the first one first."""
    return [ticket for ticket in _tickets(_directory(home)) if ticket.is_held()]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this home, waiting for it. The kernel frees it with its holder."""
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def wait_for_lock(path: Path) -> None:
    """Return once nobody holds the lock of this file, or the file is gone. It does not poll: run it in a thread."""
    with _opened(path) as descriptor:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)


def _directory(home: Path) -> Path:
    return home / "queue" / host_identity()["name"].replace("/", "_")


def _tickets(directory: Path) -> list[Ticket]:
    found = []
    with contextlib.suppress(FileNotFoundError):  # nobody ever waited here, or a person removed it
        for name in os.listdir(directory):
            number, _, run_id = name.partition(".")
            if number.isdigit():
                found.append(Ticket(directory / name, int(number), run_id))
    return sorted(found, key=lambda ticket: ticket.number)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except OSError:  # dropped meanwhile
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Take the lock for the moment until the file is closed; others who look are not kept from it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
