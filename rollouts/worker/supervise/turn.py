"""A run's turn: it waits behind those that want the same and came before, then for what live runs and others have.

Nobody polls for another run: threads wait on the locks of who is ahead, or has what is needed, and the kernel wakes
them. What others use of a GPU is asked every few seconds, by the first in line alone. Standard library only.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollouts import run_dir
from rollouts.machine.free_ports import free_ports, port_is_free
from rollouts.run_dir import LaunchPlan, NamedGpu, QueueSpec, RunDir
from rollouts.worker import busy_cards
from rollouts.worker.claims import LiveRun, Need, live_runs, needs, one_at_a_time, uses_gpus
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.other_cards import placed
from rollouts.worker.supervise.pulse import Pulse
from rollouts.worker.tickets import OwnTicket, Ticket, in_line, wait_for_lock

TICK_S = 1.0  # a stop request, and a run's heartbeat, wait so long
LOOK_AGAIN_S = 30.0  # beside what the locks tell: the place of a waiter that somebody left behind
STRANGERS_S = 5.0  # between two looks at what no lock tells: others on a GPU or a port


@dataclass(frozen=True)
class Obstacle:
    """What keeps a run from starting."""

    text: str
    locks: tuple[Path, ...]  # it may be gone when one of them is free
    look_again_s: float = LOOK_AGAIN_S


@dataclass(frozen=True)
class Choice:
    """What the run takes: a card in place of each GPU of its plan, and ports in place of its own. {}: the plan's."""

    cards: Mapping[int, NamedGpu]
    ports: Mapping[int, int]


def await_turn(pulse: Pulse, ticket: OwnTicket) -> LaunchPlan:
    """Wait for the turn; return the plan with the GPUs and ports that the run got, as plan.json has it by then.

    Raises StopRequested, or OSError where plan.json cannot be written; the place in the line is given up then.
    """
    since, line, releases, told = (
        time.monotonic(),
        WaitingLine(pulse.plan, ticket),
        Releases(),
        ("", 0),
    )
    pulse.state = "queued"
    try:
        while True:
            ahead, count = line.look()
            found = _behind(ahead) if ahead else _take(pulse.run, pulse.plan)
            if isinstance(found, LaunchPlan):
                break
            place = len(ahead) + 1
            pulse.announce(
                None, f"place {place} of {count} in the host's queue, waits for {found.text}"
            )
            if told != (found.text, place):
                told = (found.text, place)
                say(f"queued: place {place}, waits for {found.text}")
                pulse.journal.event("queued", place=place, waits_for=found.text)
            releases.wait(found, tick=pulse.tick)
    finally:
        ticket.drop()
    pulse.state = "running"
    pulse.journal.event(
        "turn", seconds=round(time.monotonic() - since, 3), has=sorted(map(str, needs(found)))
    )
    return found


class Releases:
    """Locks that are waited for, each by a thread that ends with the lock's holder."""

    def __init__(self) -> None:
        self._one_fell = threading.Event()
        self._threads: dict[Path, threading.Thread] = {}

    def wait(self, obstacle: Obstacle, *, tick: Callable[[], None]) -> None:
        """Return when one of its locks is free, or it is time to look again. Raises what `tick` raises."""
        self._one_fell.clear()
        for lock in obstacle.locks:
            if lock not in self._threads or not self._threads[lock].is_alive():
                self._threads[lock] = threading.Thread(target=self._watch, args=[lock], daemon=True)
                self._threads[lock].start()
        began = time.monotonic()
        while time.monotonic() < began + obstacle.look_again_s and not self._one_fell.wait(TICK_S):
            tick()
        while time.monotonic() < began + TICK_S:  # a lock that nobody holds yet falls at once
            time.sleep(TICK_S / 10)
        tick()

    def _watch(self, lock: Path) -> None:
        wait_for_lock(lock)
        self._one_fell.set()


# --- the line -------------------------------------------------------------------------------------------------------


class WaitingLine:
    """Those in line that want what this run wants."""

    def __init__(self, plan: LaunchPlan, own: OwnTicket) -> None:
        self._home, self._own, self._wanted = Path(plan.home), own, _wanted(plan)
        # whether the run of each ticket is one: its plan does not change meanwhile
        self._rivals: dict[str, bool] = {}

    def look(self) -> tuple[list[Ticket], int]:
        """Return the tickets ahead, and how many wait for the same in all, this run among them."""
        waiting = [ticket for ticket in in_line(self._home) if ticket.number != self._own.number]
        rivals = [ticket for ticket in waiting if self._is_rival(ticket.run_id)]
        return [ticket for ticket in rivals if ticket.number < self._own.number], len(rivals) + 1

    def _is_rival(self, run_id: str) -> bool:
        """Return whether a waiting run wants what this one wants; one whose plan cannot be read does."""
        if run_id not in self._rivals:
            try:
                other = run_dir.read_plan(RunDir(run_dir.run_path(self._home, run_id)))
            except (OSError, ValueError, TypeError, KeyError):
                return True
            self._rivals[run_id] = other is not None and not self._wanted.isdisjoint(_wanted(other))
        return self._rivals[run_id]


def _wanted(plan: LaunchPlan) -> set[Need]:
    """Return all that the run might take; GPUs and ports that may be others in the end are not among it."""
    queue = plan.queue
    if queue is None:  # its turn has come
        return set(needs(plan))
    fixed = {
        need for need in needs(plan) if need.kind == "port" and int(need.number) not in queue.ports
    }
    return fixed | ({Need("GPU", str(card.index)) for card in queue.cards} or {Need("CPU", "")})


def _behind(ahead: Sequence[Ticket]) -> Obstacle:
    return Obstacle(f"run {ahead[-1].run_id}, which came before", (ahead[0].path,))


# --- the first in line ----------------------------------------------------------------------------------------------


def _take(run: RunDir, plan: LaunchPlan) -> LaunchPlan | Obstacle:
    """Take what the plan needs, by writing what it got into plan.json; or say what is in the way."""
    assert plan.queue is not None, "a plan that waits"
    in_use: Mapping[int, str] = {}
    if plan.queue.cards:
        try:
            in_use = busy_cards.look()  # before the lock: nvidia-smi may hang
        except OSError as error:
            return Obstacle(f"an answer of nvidia-smi ({error})", (), STRANGERS_S)
    with one_at_a_time(Path(plan.home)):
        others = [
            other
            for other in live_runs(Path(plan.home), but=plan.run_id)
            if other.plan.queue is None
        ]
        found = choose(plan, plan.queue, others, in_use)
        if isinstance(found, Obstacle):
            return found
        ready = placed(plan, found.cards, found.ports)
        run_dir.write_json_atomic(run.plan, ready.to_json())
        return ready


def choose(
    plan: LaunchPlan, queue: QueueSpec, others: Collection[LiveRun], in_use: Mapping[int, str]
) -> Choice | Obstacle:
    """Decide which GPUs and ports the run gets beside the live runs `others`, or what is in the way.

    `in_use`: why each GPU of the machine is not free, or "".
    """
    held = {need: other for other in others for need in needs(other.plan)}
    chosen: dict[int, NamedGpu] | Obstacle = {}
    if queue.cards:
        chosen = _choose_cards(plan, queue, held, in_use)
    else:
        busy = [other for other in others if not uses_gpus(other.plan)]
        if len(busy) >= queue.at_once:
            runs = ", ".join(map(_named, busy))
            chosen = Obstacle(
                f"{runs}: at most {queue.at_once} at once", tuple(other.run.lock for other in busy)
            )
    if isinstance(chosen, Obstacle):
        return chosen
    if obstacle := next(_port_obstacles(plan, queue, held), None):
        return obstacle
    return _choose_ports(queue, held, chosen)


def _choose_cards(
    plan: LaunchPlan, queue: QueueSpec, held: Mapping[Need, LiveRun], in_use: Mapping[int, str]
) -> dict[int, NamedGpu] | Obstacle:
    """Return a card for each GPU of the plan, its own where they are free; {} where all of them are."""
    wanted = sorted(int(need.number) for need in needs(plan) if need.kind == "GPU")
    holders = {card.index: held.get(Need("GPU", str(card.index))) for card in queue.cards}
    whys = {
        index: _named(other) if other else _why(index, in_use) for index, other in holders.items()
    }
    free = [card for card in queue.cards if not whys[card.index]]
    if len(free) < len(wanted):
        count = f"{len(wanted)} of the GPUs " if len(whys) > len(wanted) else ""
        busy = ", ".join(f"GPU {index} ({why})" for index, why in sorted(whys.items()) if why)
        locks = tuple(other.run.lock for other in holders.values() if other)
        strangers = any(why and not holders[index] for index, why in whys.items())
        return Obstacle(f"{count}{busy}", locks, STRANGERS_S if strangers else LOOK_AGAIN_S)
    own = [card for card in free if card.index in wanted]
    if len(own) == len(wanted):
        return {}
    chosen = [*own, *(card for card in free if card not in own)][: len(wanted)]
    return dict(zip(wanted, sorted(chosen, key=lambda card: card.index), strict=True))


def _why(index: int, in_use: Mapping[int, str]) -> str:
    return in_use.get(index, "nvidia-smi does not list it")


def _named(other: LiveRun) -> str:
    return f"run {other.run.run_id} since {busy_cards.since(other.started_at)}"


def _port_obstacles(
    plan: LaunchPlan, queue: QueueSpec, held: Mapping[Need, LiveRun]
) -> Iterator[Obstacle]:
    """List what has a port that the config names."""
    for need in sorted(needs(plan), key=str):
        if need.kind != "port" or int(need.number) in queue.ports:
            continue
        if other := held.get(need):
            yield Obstacle(f"{need} ({_named(other)})", (other.run.lock,))
        elif not port_is_free(int(need.number)):
            yield Obstacle(f"{need} (something listens there)", (), STRANGERS_S)


def _choose_ports(
    queue: QueueSpec, held: Mapping[Need, LiveRun], chosen: Mapping[int, NamedGpu]
) -> Choice | Obstacle:
    """Keep the ports that were chosen at the launch, or choose others where somebody has them by now."""
    taken = {int(need.number) for need in held if need.kind == "port"}
    if all(port not in taken and port_is_free(port) for port in queue.ports):
        return Choice(chosen, {})
    first = free_ports(len(queue.ports), taken)
    if first is None:
        return Obstacle(f"{len(queue.ports)} free ports in a row", (), STRANGERS_S)
    return Choice(chosen, {old: first + offset for offset, old in enumerate(queue.ports)})
