"""The supervisors of a job of several hosts: heartbeats, meeting points, and one end for all. Standard library only.

Host 0's supervisor listens on its private address alone; each other one keeps a connection to it. Both sides first
prove that they have the run's group key (HMAC over fresh random numbers), and every line after that carries its own
code, so that a stranger on the network can neither join, nor end a run, nor forge a heartbeat. Lines are JSON, never
pickles, and bounded. What a supervisor tells is where it is: {"reached", "go", "attempt", "failed", "end", "hosts"}.
Where a trainer's death may pass, the others end their stage, too, and all begin its next attempt together, or none.
Host 0 alone decides whether the job goes on without a host that is gone, and tells the others with which it does.
"""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from rollouts.run_dir import SILENT, HostGroup
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.failures import PeerFailed, RunFailed, StopRequested
from rollouts.worker.supervise.peer_lines import (
    PeerError,
    PeerLine,
    accept,
    call_leader,
    listen,
    welcome_peer,
)
from rollouts.worker.supervise.peer_state import PeerState, final, passing, silence

BEAT_S = 1.0
SILENT_S = 15.0  # a host that was not heard of for so long is dead, or cut off
JOIN_S = 120.0  # between the first supervisor's start and the last one's: all start or none
ATTEMPT = 1000  # meeting points of an attempt, at most
AGREE_MARGIN_S = 60.0  # for another host to end its stage, beside two times its grace
REASONS_S = 3.0  # after a failure: for the other hosts to tell theirs
POLL_S = 0.1
MESSAGE_CHARS_MAX = 4000


class Peers(Protocol):
    """The other hosts of the job."""

    leads: bool  # this host is the first
    hosts: list[int]  # that are in the job still: their ranks

    def check(self) -> None:
        """Raise PeerFailed or StopRequested where another host's end, or its silence, ends this one."""
        ...

    def meet(self, pause: Callable[[], None]) -> None:
        """Return once every host has come here; `pause` is called in between. Raises as `check`."""
        ...

    def take_left(self) -> list[tuple[str, str]]:
        """Return who left the job since the last call, at the host that leads: a name and why, each."""
        ...

    def agree(self, error: RunFailed, pause: Callable[[], None], *, within_s: float) -> RunFailed:
        """Tell the others why this host's stage ended, and return why it did on all of them: `may_pass` if none of the
        reasons forbids another attempt. Then all hosts begin it; `pause` is called while this waits for the others."""
        ...

    def others_reasons(self) -> str:
        """Return what other hosts say of a failure of this one, in words; "" for nothing."""
        ...

    def end(self, state: str, message: str, code: int, *, own: bool) -> None:
        """Tell the others how this host's part ended, and leave. `own`: it is not another host's end that ended it."""
        ...


class NoPeers:
    """Peers of a run on one host."""

    leads = True

    def __init__(self) -> None:
        self.hosts = [0]

    def check(self) -> None:
        return None

    def meet(self, pause: Callable[[], None]) -> None:
        return None

    def take_left(self) -> list[tuple[str, str]]:
        return []

    def agree(self, error: RunFailed, pause: Callable[[], None], *, within_s: float) -> RunFailed:
        return error

    def others_reasons(self) -> str:
        return ""

    def end(self, state: str, message: str, code: int, *, own: bool) -> None:
        return None


class GroupPeers:
    """Peers over connections to host 0, or, on host 0, from all others."""

    def __init__(self, group: HostGroup, key: bytes) -> None:
        self._group, self._key, self.leads = group, key, group.leads
        now = time.monotonic()
        ranks = range(1, len(group.hosts)) if group.leads else (0,)
        self._peers = {
            rank: PeerState(f"{group.hosts[rank].name} ({group.hosts[rank].target})", now)
            for rank in ranks
        }
        self.hosts = list(range(len(group.hosts)))
        # who is out of the job, and why, until `take_left`
        self._left: list[tuple[int, str]] = []
        self._reached = 0
        self._attempt = 0
        self._failed: dict[str, Any] | None = None
        self._end: dict[str, Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        if group.leads:
            listening = listen(group.leader.address, group.supervisor_port)
            threading.Thread(target=self._serve, args=(listening,), daemon=True).start()
        else:
            threading.Thread(target=self._keep_calling, daemon=True).start()

    def check(self) -> None:
        with self._changed:
            self._check()

    def meet(self, pause: Callable[[], None]) -> None:
        with self._changed:
            self._reached += 1
            self._changed.notify_all()
        while not self._all_here():
            pause()

    def take_left(self) -> list[tuple[str, str]]:
        with self._changed:
            new, self._left = self._left, []
        return [(self._group.hosts[rank].name, why) for rank, why in new]

    def agree(self, error: RunFailed, pause: Callable[[], None], *, within_s: float) -> RunFailed:
        with self._changed:
            self._failed = {
                "message": str(error)[:MESSAGE_CHARS_MAX],
                "code": error.exit_code,
                "may_pass": error.may_pass,
                "own": not isinstance(error, PeerFailed),
            }
            self._changed.notify_all()
        deadline = time.monotonic() + within_s + AGREE_MARGIN_S
        while (agreed := self._agreed(error)) is None and time.monotonic() < deadline:
            pause()
        if agreed is None or not agreed.may_pass:
            return agreed or PeerFailed(
                f"{error} (not started again: another host did not answer)",
                window=error.window,
                exit_code=error.exit_code,
            )
        with self._changed:
            self._attempt += 1
            self._failed, self._reached = None, self._attempt * ATTEMPT
            self._changed.notify_all()
        return agreed

    def _agreed(self, error: RunFailed) -> RunFailed | None:
        """Return why the stage ended on all hosts, once that is known here: at the first one, which decides, from all;
        at the others once that one goes on, or has ended."""
        with self._changed:
            if not self._group.leads:
                first = self._peers[0]
                if first.attempt > self._attempt:
                    return error if error.may_pass else passing(error)
                return final(error) if first.is_gone(SILENT_S) else None
            for peer_rank in self._present():
                peer = self._peers[peer_rank]
                lost = self._lost(peer_rank) if peer.is_silent(SILENT_S) else None
                if peer.end is not None or (lost is not None and not lost.may_pass):
                    return final(error, also=lost)
            present = [self._peers[rank] for rank in self._present()]
            told = [peer.failure(self._attempt) for peer in present]
            own = [
                failure
                for failure, peer in zip(told, present, strict=True)
                if failure is not None and peer.failed is not None and peer.failed.get("own")
            ]
            own += [silence(why) for _, why in self._left]
        own += [] if isinstance(error, PeerFailed) else [error]
        if lasting := [failure for failure in own if not failure.may_pass]:
            return lasting[0]
        if None in told or not own:
            return None
        reasons = "; ".join(str(failure) for failure in own)
        return RunFailed(reasons, window=own[0].window, exit_code=own[0].exit_code, may_pass=True)

    def others_reasons(self) -> str:
        if not self._group.leads:
            return ""
        deadline = time.monotonic() + REASONS_S
        while not self._told() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return "".join(f". {told}" for told in self._told())

    def end(self, state: str, message: str, code: int, *, own: bool) -> None:
        with self._changed:
            self._end = {
                "state": state,
                "message": message[:MESSAGE_CHARS_MAX],
                "code": code,
                "own": own,
            }
            self._changed.notify_all()
        began = time.monotonic()
        while not self._all_told(time.monotonic() - began):
            time.sleep(POLL_S)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _all_here(self) -> bool:
        with self._changed:
            self._check()
            if self._group.leads:
                return all(self._peers[rank].reached >= self._reached for rank in self._present())
            first = self._peers[0]
            is_done = first.end is not None and first.end.get("state") == "done"
            return is_done or first.go >= self._reached

    def _all_told(self, waited_s: float) -> bool:
        """Return whether the last line went out to all that may still wait for it: a host that is not told takes this
        one for dead."""
        with self._changed:
            peers = [self._peers[rank] for rank in self._present()]
        return all(
            peer.told_end
            or peer.is_gone(SILENT_S)
            or waited_s > (SILENT_S if peer.joined else 2 * BEAT_S)
            for peer in peers
        )

    def _told(self) -> list[str]:
        """Return the failures of other hosts that are their own."""
        with self._changed:
            present = [self._peers[rank] for rank in self._present()]
            ends = [(peer.name, peer.end) for peer in present if peer.end is not None]
        return [
            f"{name}: {end.get('message')}"
            for name, end in ends
            if end.get("own") and end.get("state") == "failed"
        ]

    def _check(self) -> None:
        if self._group.rank not in self.hosts:
            raise PeerFailed(
                f"{self._peers[0].name} goes on without this host, which it did not hear of, or has no share for",
                window=SUPERVISOR_WINDOW,
            )
        for rank in self._present():
            peer = self._peers[rank]
            if peer.end is not None and peer.end.get("state") == "stopped":
                raise StopRequested(f"{peer.name}: {peer.end.get('message')}")
            if peer.end is not None and peer.end.get("state") == "failed":
                code = peer.end.get("code")
                raise PeerFailed(
                    f"{peer.name}: {peer.end.get('message')}",
                    window=SUPERVISOR_WINDOW,
                    exit_code=code if isinstance(code, int) and 0 < code < 256 else 1,
                )
            if (failure := peer.failure(self._attempt)) is not None:
                raise failure
            silent_s = time.monotonic() - peer.heard_at
            if not peer.joined and silent_s > JOIN_S:
                raise PeerFailed(
                    f"{peer.name} did not join within {JOIN_S:g} s: all hosts of a run start, or none",
                    window=SUPERVISOR_WINDOW,
                )
            if peer.joined and peer.end is None and silent_s > SILENT_S:
                raise self._lost(rank)

    def _present(self) -> list[int]:
        """Return the ranks of the peers that are in the job still."""
        return [rank for rank in self._peers if rank in self.hosts]

    def _lost(self, rank: int) -> PeerFailed:
        """Return the end of a host that is gone: at the first host `may_pass`, where the job may go on without it.

        It is out of the job then, and so are those that have no share any more; the others are told at once.
        """
        name = self._peers[rank].name
        why = f"{name} {SILENT} for {SILENT_S:g} s: it died, or the network between the hosts did"
        alive = [host for host in self.hosts if host != rank]
        going_on = self._group.going_on(alive) if self._group.leads else []
        if not going_on:
            few = f". The job cannot go on with {len(alive)} of its hosts: target.hosts_min"
            why += few if self._group.leads and self._group.fewer else ""
            return PeerFailed(why, window=SUPERVISOR_WINDOW)
        self.hosts = going_on
        spare = f"the job's batches divide over {len(going_on)} hosts, and not over {len(alive)}"
        self._left += [(rank, why), *((host, spare) for host in alive if host not in going_on)]
        self._changed.notify_all()
        return silence(why)

    # --- threads ---

    def _serve(self, listening: socket.socket) -> None:
        """Take connections, on host 0. Whoever comes proves itself on a thread of its own, and keeps nobody waiting."""
        with listening:
            while not self._closed:
                if (connection := accept(listening)) is not None:
                    threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        welcomed = welcome_peer(connection, self._key, ranks=self._peers.keys())
        if welcomed is not None:
            rank, channel = welcomed
            self._talk(self._peers[rank], channel)

    def _keep_calling(self) -> None:
        """Call host 0, and again whenever the connection is lost."""
        while not self._closed:
            try:
                channel = call_leader(
                    self._group.leader.address,
                    self._group.supervisor_port,
                    self._key,
                    rank=self._group.rank,
                )
            except (OSError, PeerError):
                time.sleep(BEAT_S)
                continue
            self._talk(self._peers[0], channel)

    def _talk(self, peer: PeerState, channel: PeerLine) -> None:
        """Tell and hear until the connection ends."""
        with self._changed:
            before, peer.channel = peer.channel, channel
        if before is not None:
            before.close()
        threading.Thread(target=self._tell, args=(peer, channel), daemon=True).start()
        try:
            while True:
                row = channel.receive(timeout_s=SILENT_S)
                with self._changed:
                    peer.hear(row)
                    if not self._group.leads and isinstance(row.get("hosts"), list):
                        self.hosts = row["hosts"]
                    self._changed.notify_all()
        except (OSError, PeerError):
            channel.close()

    def _tell(self, peer: PeerState, channel: PeerLine) -> None:
        """Send where this host is: every second, and at once when it changed."""
        sent: dict[str, Any] = {}
        while not self._closed and not channel.closed:
            with self._changed:
                row = self._row()
                if row == sent:
                    self._changed.wait(BEAT_S)
                    row = self._row()
            try:
                channel.send(row)
            except OSError:
                return channel.close()
            sent = row
            if row["end"] is not None:
                with self._changed:
                    peer.told_end = True
        channel.close()

    def _row(self) -> dict[str, Any]:
        go = (
            min([self._reached, *(self._peers[rank].reached for rank in self._present())])
            if self._group.leads
            else 0
        )
        return {
            "reached": self._reached,
            "go": go,
            "attempt": self._attempt,
            "failed": self._failed,
            "end": self._end,
            "hosts": self.hosts,
        }
