"""The supervisors of a run on several hosts: who is let in, what ends all, and when silence does."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rollouts.run_dir import GroupHost, HostGroup
from rollouts.worker.supervise import peer_lines, peers
from rollouts.worker.supervise.failures import PeerFailed, RunFailed, StopRequested
from rollouts.worker.supervise.peers import GroupPeers
from tests.ports import free_port
from tests.remote.hosts import wait_for

KEY = b"the run's key"
QUIET_S = 3.0  # of who is dead; those beside it beat twenty times a second, on a busy machine too


def group(rank: int, port: int, count: int = 2, fewer: list[int] | None = None) -> HostGroup:
    hosts = [
        GroupHost(target=f"h{n}", name=f"node{n}", address="127.0.0.1", interface="lo")
        for n in range(count)
    ]
    return HostGroup(
        rank=rank, hosts=hosts, supervisor_port=port, trainer_port=1, fewer=fewer or []
    )


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GroupPeers]]:
    """Make a host's peers; all of them leave at the end."""
    monkeypatch.setattr(peers, "BEAT_S", 0.05)
    port, made = free_port(), []

    def make(
        rank: int, *, key: bytes = KEY, count: int = 2, fewer: list[int] | None = None
    ) -> GroupPeers:
        made.append(GroupPeers(group(rank, port, count, fewer), key))
        return made[-1]

    make.port = port  # type: ignore[attr-defined]
    yield make
    for one in made:
        one.end("done", "", 0, own=True)


def meets(one: GroupPeers) -> threading.Thread:
    """Have a host come to its next meeting point, on a thread that ends once all are there."""
    thread = threading.Thread(target=one.meet, args=(lambda: time.sleep(0.01),), daemon=True)
    thread.start()
    return thread


def raised(one: GroupPeers) -> Exception | None:
    """Return what ends this host's part now."""
    try:
        one.check()
    except (PeerFailed, StopRequested) as error:
        return error
    return None


def test_hosts_wait_for_each_other(join: Callable[..., GroupPeers]) -> None:
    """Goal: nobody passes a meeting point before all have come there. Red where a member goes by its own count."""
    leader, one = join(0, count=3), join(1, count=3)
    first, second = meets(leader), meets(one)
    wait_for(lambda: leader._peers[1].reached == 1, "the leader's word of it")
    assert first.is_alive() and second.is_alive()
    third = meets(join(2, count=3))
    wait_for(
        lambda: not any(thread.is_alive() for thread in (first, second, third)),
        "the end of all waits",
    )


def test_one_failure_ends_all(join: Callable[..., GroupPeers]) -> None:
    """Goal: a member's failure reaches every host, with its words and its exit code; a stop is a stop. Red with `end`
    left out of what the leader tells."""
    leader, one, two = (join(rank, count=3) for rank in range(3))
    wait_for(lambda: all(peer.joined for peer in leader._peers.values()), "both")
    one.end("failed", "trainer ended with exit code 7", 7, own=True)
    error = wait_for(lambda: raised(leader), "the failure at the leader")
    assert isinstance(error, PeerFailed) and error.exit_code == 7
    assert str(error) == "node1 (h1): trainer ended with exit code 7"
    assert leader.others_reasons() == ". node1 (h1): trainer ended with exit code 7"
    leader.end("failed", str(error), error.exit_code, own=False)
    error = wait_for(lambda: raised(two), "the failure at the third host")
    assert (
        str(error) == "node0 (h0): node1 (h1): trainer ended with exit code 7"
        and error.exit_code == 7
    )


def test_a_stop_is_no_failure(join: Callable[..., GroupPeers]) -> None:
    """Goal: `deploy stop` at the leader ends the others as stopped. Red with it told as a failure."""
    leader, one = join(0), join(1)
    wait_for(lambda: one._peers[0].joined, "the leader's word")
    leader.end("stopped", "stopped by SIGTERM", 143, own=True)
    assert isinstance(wait_for(lambda: raised(one), "the stop"), StopRequested)


def test_an_end_that_goes_out_late(
    join: Callable[..., GroupPeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a host leaves only once the others have heard of its end, however slow it is: else they take it for dead.
    Red with two beats' time for it."""
    leader, one = join(0), join(1)
    wait_for(lambda: one._peers[0].joined and leader._peers[1].joined, "both")
    send, sending = peer_lines.PeerLine.send, threading.Event()

    def slowly(line: peer_lines.PeerLine, row: dict[str, Any]) -> None:
        if line is leader._peers[1].channel:
            sending.set()
            time.sleep(20 * peers.BEAT_S)
        send(line, row)

    monkeypatch.setattr(peer_lines.PeerLine, "send", slowly)
    assert sending.wait(60), "a beat is under way"
    leader.end("stopped", "stopped by SIGTERM", 143, own=True)
    assert isinstance(wait_for(lambda: raised(one), "the stop"), StopRequested)


@pytest.mark.parametrize("silent", [0, 1])
def test_silence_is_death(
    silent: int, join: Callable[..., GroupPeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a host that is not heard of any more ends the run, the leader too; one that calls again in time does not.
    Red with a lost connection taken for an end, and with `heard_at` kept fresh by it."""
    made = [join(0), join(1)]
    lives, dies = made[1 - silent], made[silent]
    wait_for(lambda: made[0]._peers[1].joined and made[1]._peers[0].joined, "both")
    channel = made[0]._peers[1].channel
    assert channel is not None
    channel.close()
    wait_for(lambda: made[0]._peers[1].channel is not channel, "another connection")
    assert raised(lives) is None and raised(dies) is None
    dies._closed = True  # it says no more
    monkeypatch.setattr(peers, "SILENT_S", QUIET_S)
    error = wait_for(lambda: raised(lives), "its death")
    assert f"node{silent} (h{silent}) was not heard of for {QUIET_S:g} s" in str(error)


def test_the_job_goes_on_without_a_host_that_is_gone(
    join: Callable[..., GroupPeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: of four hosts one is gone, and the batches divide over two: the first two that live agree on another
    attempt, and the third that lives, which has no share, ends. A later death ends the run.

    Red with the spare host kept, and with `hosts` left out of what the leader tells."""
    leader, dies, second, spare = (join(rank, count=4, fewer=[2]) for rank in range(4))
    wait_for(lambda: all(peer.joined for peer in leader._peers.values()), "all")
    wait_for(lambda: second._peers[0].joined and spare._peers[0].joined, "the leader's word")
    dies._closed = True
    monkeypatch.setattr(peers, "SILENT_S", QUIET_S)
    error = wait_for(lambda: raised(leader), "its death")
    assert isinstance(error, PeerFailed) and error.may_pass
    assert f"node1 (h1) was not heard of for {QUIET_S:g} s" in str(error)
    told = wait_for(lambda: raised(spare), "the word at the spare host")
    assert isinstance(told, PeerFailed) and not told.may_pass
    assert "node0 (h0) goes on without this host" in str(told)
    agreed = _agree({leader: error, second: RunFailed("gloo", window="trainer", may_pass=True)})
    assert [one.may_pass for one in agreed.values()] == [True, True]
    assert leader.hosts == second.hosts == [0, 2]
    left = dict(leader.take_left())
    assert (
        "was not heard of" in left["node1"]
        and "divide over 2 hosts, and not over 3" in left["node3"]
    )
    assert leader.take_left() == []
    second._closed = True
    last = wait_for(lambda: raised(leader), "the second death")
    assert isinstance(last, PeerFailed) and not last.may_pass
    assert "cannot go on with 1 of its hosts: target.hosts_min" in str(last)


def _agree(errors: dict[GroupPeers, RunFailed]) -> dict[GroupPeers, RunFailed]:
    """Have hosts agree, each with why its stage ended."""
    found: dict[GroupPeers, RunFailed] = {}

    def agree(one: GroupPeers, error: RunFailed) -> None:
        found[one] = one.agree(error, lambda: time.sleep(0.01), within_s=1.0)

    threads = [threading.Thread(target=agree, args=pair, daemon=True) for pair in errors.items()]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(found) == len(errors), "the agreement")
    return found


def test_one_that_never_comes(
    join: Callable[..., GroupPeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: all start or none: a host whose supervisor never comes ends the others' wait. Red without JOIN_S."""
    monkeypatch.setattr(peers, "JOIN_S", 0.5)
    leader = join(0)
    error = wait_for(lambda: raised(leader), "the end of the wait")
    assert "node1 (h1) did not join within 0.5 s: all hosts of a run start, or none" in str(error)


def test_strangers_are_not_let_in(join: Callable[..., GroupPeers]) -> None:
    """Goal: whoever lacks the run's key neither joins nor ends a run, nor keeps the others from joining.
    Red with the codes not compared."""
    leader = join(0)
    port = join.port  # type: ignore[attr-defined]
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]  # they say nothing
    stranger = join(1, key=b"another key")
    with pytest.raises(peer_lines.PeerError):
        peer_lines.call_leader("127.0.0.1", port, b"another key", rank=1)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as forger:
        forger.sendall(
            b"00" * 16 + b"\n" + b"0" * 64 + b" " + json.dumps({"rank": 1}).encode() + b"\n"
        )
        forger.sendall(b"x" * 200_000)
        assert _end_of(forger)
    assert not leader._peers[1].joined and not stranger._peers[0].joined
    member = join(1)
    wait_for(lambda: leader._peers[1].joined and member._peers[0].joined, "the member")
    for connection in idle:
        connection.close()


def _end_of(connection: socket.socket) -> bool:
    """Whether the other side ends it."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def test_lines_that_were_changed() -> None:
    """Goal: a line that was changed or sent again is not taken. Red with the number left out of the code."""
    ours, theirs = socket.socketpair()
    for damage in (lambda line: line.replace(b"1", b"2"), lambda line: line):
        receiver = peer_lines.PeerLine(theirs, KEY, leads=False)
        sender = peer_lines.PeerLine(ours, KEY, leads=True)
        sender.send({"go": 1})
        assert receiver.receive(timeout_s=10) == {"go": 1}
        code, text = sender._code(b"leader", 0, b'{"go": 1}'), b'{"go": 1}'
        ours.sendall(damage(code + b" " + text) + b"\n")  # recorded, or made up
        with pytest.raises(peer_lines.PeerError, match="without the run's key"):
            receiver.receive(timeout_s=10)
    ours.close()
    theirs.close()
