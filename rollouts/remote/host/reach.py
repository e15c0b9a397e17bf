"""How the hosts of one job reach each other: at which address of each, and how far their clocks are apart."""

import contextlib
import ipaddress
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.read_answer import checked, fits, read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import Stream, Transport

LISTEN_S = 30.0
CALL_S = 60.0
LEADER_PORTS = 2  # the supervisors', and torchrun's store
CLOCKS_S = 2.0
ADDRESSES_MAX = 64  # of one host
PROBE = "rollouts.remote.host.reach_probe"


@dataclass(frozen=True)
class Place:
    """Where one host can be met by the others."""

    interface: str
    address: str
    ports: tuple[int, ...]  # that were tried: those that were chosen, then those of engines


@dataclass(frozen=True)
class Reach:
    """What was found: a place for each host, in order, or problems."""

    places: tuple[Place, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AskedHost:
    """One host, as it is asked."""

    transport: Transport
    python: str
    address: str | None  # that the user gave
    engine_ports: tuple[int, ...] = ()  # which the job will use there, beside those that are chosen

    @property
    def name(self) -> str:
        return self.transport.target


NOWHERE = Place("", "0.0.0.0", (0,))  # of a host that has no such address: nobody reaches it
# (caller, called) -> (address, port) -> clock difference
Answers = dict[tuple[int, int], dict[tuple[str, int], float]]


def find_reach(sides: Sequence[AskedHost]) -> Reach:
    """Have each host listen at its addresses, and call all others. Raises DeployError."""
    tokens = [secrets.token_hex(8) for _ in sides]
    with contextlib.ExitStack() as stack:
        listening = []
        for index, side in enumerate(sides):
            count = LEADER_PORTS if index == 0 else 1
            question = {
                "token": tokens[index],
                "count": count,
                "ports": side.engine_ports,
                "address": side.address,
            }
            listening.append(stack.enter_context(_listening(side, question)))
        answers: Answers = {}
        for caller, side in enumerate(sides):
            for called, places in enumerate(listening):
                if caller != called:
                    answers[caller, called] = _call(side, tokens[called], places)
    return decide_reach([side.name for side in sides], listening, answers)


@contextlib.contextmanager
def _listening(side: AskedHost, question: dict[str, object]) -> Iterator[list[Place]]:
    argv, program = sent_program(side.python, PROBE, "listen", json.dumps(question))
    stream: Stream = side.transport.stream(argv, first_line=program)
    try:
        places = next(filter(None, map(_places, stream.lines(idle_timeout_s=LISTEN_S))), None)
        if places is None:
            found = stream.end().err[-1000:] or "no answer"
            raise DeployError(
                f"{side.name}: the ways between the hosts cannot be tried.", found=found
            )
        yield places
    finally:
        stream.close()


def _places(line: bytes) -> list[Place] | None:
    """Return where a host says that it listens; None for another line."""
    try:
        rows = checked(json.loads(line), {"listening": list[dict[str, Any]]})["listening"]
        return [_place(row) for row in rows[:ADDRESSES_MAX]] or [NOWHERE]
    except (ValueError, RecursionError):
        return None


def _place(row: dict[str, Any]) -> Place:
    """Return one place, checked: it goes into variables and command lines. Raises ValueError."""
    checked(row, {"interface": str, "address": str, "ports": list[int]})
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", row["interface"]) or not all(
        0 < port < 65536 for port in row["ports"]
    ):
        raise ValueError("not an interface, or not a port")
    return Place(row["interface"], str(ipaddress.ip_address(row["address"])), tuple(row["ports"]))


def _call(side: AskedHost, token: str, places: Sequence[Place]) -> dict[tuple[str, int], float]:
    pairs = [[place.address, port] for place in places for port in place.ports]
    argv, program = sent_program(
        side.python, PROBE, "call", json.dumps({"token": token, "places": pairs})
    )
    done = side.transport.run(argv, stdin=program, timeout_s=CALL_S)
    said = read_answer(side.name, "which hosts it reaches", done.out, {"reached": list[list[Any]]})
    rows = [
        row
        for row in said["reached"]
        if len(row) == 3 and fits(row[:1], list[str]) and fits(row[1:], list[float])
    ]
    return {(address, int(port)): float(differs) for address, port, differs in rows}


def decide_reach(
    names: Sequence[str], listening: Sequence[Sequence[Place]], answers: Answers
) -> Reach:
    """Choose the address of each host that all others reach on every port: private ones and IPv4 first. Pure."""
    places: list[Place] = []
    problems: list[Problem] = []
    warnings: list[str] = []
    for index, candidates in enumerate(listening):
        ordered = sorted(
            candidates, key=lambda place: (_is_public(place.address), ":" in place.address)
        )
        callers = [caller for caller in range(len(names)) if caller != index]
        fits = [
            place
            for place in ordered
            if not any(_missing(place, answers[caller, index]) for caller in callers)
        ]
        if not fits:
            problems.append(_unreached(names, index, ordered, answers))
            continue
        places.append(fits[0])
        if _is_public(fits[0].address):
            warnings.append(
                f"{names[index]}: the hosts meet at {fits[0].address}, which is not a private address: gloo and NCCL"
                " encrypt nothing, and whoever reaches it can join their talk. docs/security.md says what follows"
            )
        warnings += _clock_warnings(names, index, fits[0], answers)
    return Reach(tuple(places), tuple(problems), tuple(dict.fromkeys(warnings)))


def _is_public(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def _missing(place: Place, reached: dict[tuple[str, int], float]) -> list[int]:
    return [port for port in place.ports if (place.address, port) not in reached]


def _clock_warnings(
    names: Sequence[str], index: int, place: Place, answers: Answers
) -> Iterator[str]:
    if (
        index == 0
        and (differs := answers[1, 0][place.address, place.ports[0]])
        and abs(differs) > CLOCKS_S
    ):
        yield _clocks(names[1], names[0], differs)
    if index > 1 and abs(differs := answers[0, index][place.address, place.ports[0]]) > CLOCKS_S:
        yield _clocks(names[0], names[index], differs)


def _clocks(one: str, other: str, differs: float) -> str:
    return (
        f"the clocks of {one} and {other} are {abs(differs):.0f} s apart: times in their logs do not fit together."
        " Turn on NTP there"
    )


def _unreached(
    names: Sequence[str], index: int, candidates: Sequence[Place], answers: Answers
) -> Problem:
    found = [
        f"{names[caller]} does not reach {place.address} ({place.interface}), port {', '.join(map(str, missing))}"
        for place in candidates
        if place != NOWHERE
        for caller in range(len(names))
        if caller != index and (missing := _missing(place, answers[caller, index]))
    ]
    return Problem(
        f"{names[index]}: the other hosts of the job do not reach it.",
        found="\n".join(found)
        or "it has no network address but loopback, or not the one that the hosts file names",
        needed="an address of each host that all others reach, on any port: torchrun, gloo and NCCL choose theirs",
        fix="put the hosts into one private network, or open its firewall between them; in a --hosts FILE the second"
        " word of a line is the address",
    )
