"""The supervisors of a job of several hosts: heartbeats, meeting points, and one end for all. Standard library only.

Host 0's supervisor listens on its private address alone; each other one keeps a connection to it. Both sides first
prove that they have the run's group key (HMAC over fresh random numbers), and every line after that carries its own
code, so that a stranger on the network can neither join, nor end a run, nor forge a heartbeat. Lines are JSON, never
pickles, and bounded. What a supervisor tells is where it is: {"reached", "go", "end"}.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollouts.run_dir import HostGroup
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.failures import PeerFailed, StopRequested
from rollouts.worker.supervise.peer_lines import Channel, PeerError, accept, call_leader, listen, welcome_peer

BEAT_S = 1.0
SILENT_S = 15.0  # a host that was not heard of for so long is dead, or cut off
JOIN_S = 120.0  # between the first supervisor's start and the last one's: all start or none
REASONS_S = 3.0  # after a failure: for the other hosts to tell theirs
POLL_S = 0.1
MESSAGE_CHARS_MAX = 4000


class Peers(Protocol):
    """The other hosts of the job."""

    def check(self) -> None:
        """Raise PeerFailed or StopRequested where another host's end, or its silence, ends this one."""
        ...

    def meet(self, pause: Callable[[], None]) -> None:
        """Return once every host has come here; `pause` is called in between. Raises as `check`."""
        ...

    def others_reasons(self) -> str:
        """Return what other hosts say of a failure of this one, in words; "" for nothing."""
        ...

    def end(self, state: str, message: str, code: int, *, own: bool) -> None:
        """Tell the others how this host's part ended, and leave. `own`: it is not another host's end that ended it."""
        ...


class NoPeers:
    """Peers of a run on one host."""

    def check(self) -> None:
        return None

    def meet(self, pause: Callable[[], None]) -> None:
        return None

    def others_reasons(self) -> str:
        return ""

    def end(self, state: str, message: str, code: int, *, own: bool) -> None:
        return None


@dataclass
class _Peer:
    """What is known of another host."""

    name: str
    heard_at: float  # monotonic; before its first word: when the waiting for it began
    joined: bool = False
    reached: int = 0
    go: int = 0
    end: dict[str, Any] | None = None
    told_end: bool = False  # this host's end went out to it
    channel: Channel | None = field(default=None, repr=False)

    def hear(self, row: dict[str, Any]) -> None:
        self.heard_at, self.joined = time.monotonic(), True
        self.reached = max(self.reached, int(row.get("reached", 0)))
        self.go = max(self.go, int(row.get("go", 0)))
        if isinstance(row.get("end"), dict):
            self.end = row["end"]


class GroupPeers:
    """Peers over connections to host 0, or, on host 0, from all others."""

    def __init__(self, group: HostGroup, key: bytes) -> None:
        self._group, self._key = group, key
        now = time.monotonic()
        ranks = range(1, len(group.hosts)) if group.leads else (0,)
        self._peers = {rank: _Peer(f"{group.hosts[rank].name} ({group.hosts[rank].target})", now) for rank in ranks}
        self._reached = 0
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

    def others_reasons(self) -> str:
        if not self._group.leads:
            return ""
        deadline = time.monotonic() + REASONS_S
        while not self._told() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return "".join(f". {told}" for told in self._told())

    def end(self, state: str, message: str, code: int, *, own: bool) -> None:
        with self._changed:
            self._end = {"state": state, "message": message[:MESSAGE_CHARS_MAX], "code": code, "own": own}
            self._changed.notify_all()
        deadline = time.monotonic() + 2 * BEAT_S
        while time.monotonic() < deadline and not self._all_told():
            time.sleep(POLL_S)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _all_here(self) -> bool:
        with self._changed:
            self._check()
            if self._group.leads:
                return all(peer.reached >= self._reached for peer in self._peers.values())
            return self._peers[0].go >= self._reached

    def _all_told(self) -> bool:
        """Return whether the last line went out to all."""
        with self._changed:
            return all(peer.told_end for peer in self._peers.values())

    def _told(self) -> list[str]:
        """Return the failures of other hosts that are their own."""
        with self._changed:
            ends = [(peer.name, peer.end) for peer in self._peers.values() if peer.end is not None]
        return [
            f"{name}: {end.get('message')}" for name, end in ends if end.get("own") and end.get("state") == "failed"
        ]

    def _check(self) -> None:
        for peer in self._peers.values():
            if peer.end is not None and peer.end.get("state") == "stopped":
                raise StopRequested(f"{peer.name}: {peer.end.get('message')}")
            if peer.end is not None and peer.end.get("state") == "failed":
                code = peer.end.get("code")
                raise PeerFailed(
                    f"{peer.name}: {peer.end.get('message')}",
                    window=SUPERVISOR_WINDOW,
                    exit_code=code if isinstance(code, int) and 0 < code < 256 else 1,
                )
            silent_s = time.monotonic() - peer.heard_at
            if not peer.joined and silent_s > JOIN_S:
                raise PeerFailed(
                    f"{peer.name} did not join within {JOIN_S:g} s: all hosts of a run start, or none",
                    window=SUPERVISOR_WINDOW,
                )
            if peer.joined and peer.end is None and silent_s > SILENT_S:
                raise PeerFailed(
                    f"{peer.name} was not heard of for {SILENT_S:g} s: it died, or the network between the hosts did",
                    window=SUPERVISOR_WINDOW,
                )

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
                    self._group.leader.address, self._group.supervisor_port, self._key, rank=self._group.rank
                )
            except (OSError, PeerError):
                time.sleep(BEAT_S)
                continue
            self._talk(self._peers[0], channel)

    def _talk(self, peer: _Peer, channel: Channel) -> None:
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
                    self._changed.notify_all()
        except (OSError, PeerError):
            channel.close()

    def _tell(self, peer: _Peer, channel: Channel) -> None:
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
        go = min([self._reached, *(peer.reached for peer in self._peers.values())]) if self._group.leads else 0
        return {"reached": self._reached, "go": go, "end": self._end}
