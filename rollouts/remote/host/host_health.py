"""How a host is doing: what `deploy doctor` measures there, in one round trip beside that of the facts.

rollouts/worker/host_check is sent as source and runs under the host's Python. Its answer is checked field by field.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from rollouts.remote.host.read_answer import MalformedError, checked, malformed, read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import Transport

HEALTH_TIMEOUT_S = 120  # nvidia-smi may hang for each of its questions
_PROGRAM = "rollouts.worker.host_check.host_report"
_PREFIX = "health="
_QUESTION = "how it is doing"
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A directory that runs write into: `home`, `tmp` or `shm`."""

    name: str
    path: str
    file_system: str
    total_mib: int
    free_mib: int
    free_files: int | None  # None: it has no limit of its own
    runs_programs: bool  # not mounted noexec
    locks: bool
    write_mib_s: float | None  # to the disk itself; None: too little room to tell, or not writable
    problem: str  # why nothing can be written there


@dataclass(frozen=True, kw_only=True)
class Site:
    """The hub, or a package index."""

    kind: str
    url: str
    seconds: float | None
    problem: str


@dataclass(frozen=True, kw_only=True)
class ModelAccess:
    """May the run read a model of the hub? `state`: open, gated, missing or unknown."""

    name: str
    state: str
    problem: str
    token: bool  # one was sent


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose a process on a card is, and since when it runs."""

    pid: int
    user: str
    started_at: float


@dataclass(frozen=True, kw_only=True)
class CardHealth:
    """A card's own counters. None: not told."""

    index: int
    pcie_width: int | None
    pcie_width_max: int | None
    pcie_gen_max: int | None
    ecc: str  # "Enabled", "Disabled", ""
    ecc_uncorrected: int | None  # since the driver was loaded
    ecc_corrected: int | None
    temperature_c: int | None
    slowed_down: bool  # by heat or power, in hardware
    remap_pending: bool  # memory rows wait for a reset of the card
    remap_failed: bool


@dataclass(frozen=True, kw_only=True)
class HostHealth:
    """One host at one moment. Limits are (soft, hard); None: without a limit."""

    cores: int
    cores_allowed: float
    memory_mib: int
    memory_free_mib: int
    memory_limit_mib: int | None  # of this account's control group, a container's among them
    open_files: tuple[int | None, ...]
    processes: tuple[int | None, ...]
    locked_kib: tuple[int | None, ...]
    file_mib: tuple[int | None, ...]
    disks: tuple[Disk, ...]
    cards: tuple[CardHealth, ...]
    links: Mapping[str, str]  # "0-1": "NV18", as nvidia-smi topo writes it
    owners: tuple[Owner, ...]
    sites: tuple[Site, ...]
    models: tuple[ModelAccess, ...]
    offline: bool  # the host's settings keep programs from asking the hub
    clock_ahead_s: tuple[float, float]  # between these the host's clock is ahead of this machine's


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to look at. `env` and `token` are those that the run would have."""

    home: str
    pids: Sequence[int] = ()
    models: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    token: str = ""


_FIELDS: dict[str, Any] = {
    "began_at": float,
    "ended_at": float,
    "cores": int,
    "cores_allowed": float,
    "memory_mib": int,
    "memory_free_mib": int,
    "memory_limit_mib": int | None,
    "open_files": list[int | None],
    "processes": list[int | None],
    "locked_kib": list[int | None],
    "file_mib": list[int | None],
    "disks": list[dict[str, Any]],
    "cards": dict[str, dict[str, Any]],
    "topology": str,
    "owners": list[dict[str, Any]],
    "sites": list[dict[str, Any]],
    "models": list[dict[str, Any]],
    "offline": bool,
}


def examine(transport: Transport, python: str, question: Question) -> HostHealth:
    """Measure the host. Raises TransportError, or DeployError for an answer that cannot be read."""
    argv, program = sent_program(python, _PROGRAM)
    asked = {item.name: getattr(question, item.name) for item in fields(question)}
    asked |= {
        "pids": list(question.pids),
        "models": list(question.models),
        "env": dict(question.env),
    }
    sent_at = time.time()
    done = transport.run(
        argv, stdin=program + json.dumps(asked).encode() + b"\n", timeout_s=HEALTH_TIMEOUT_S
    )
    answered_at = time.time()
    if done.returncode != 0:
        raise malformed(
            transport.target, _QUESTION, f"exit code {done.returncode}", done.err or done.out
        )
    answer = read_answer(transport.target, _QUESTION, done.out, _FIELDS, prefix=_PREFIX)
    try:
        return _health(answer, sent_at, answered_at)
    except MalformedError as error:
        raise malformed(transport.target, _QUESTION, str(error), done.out) from None


def _health(answer: dict[str, Any], sent_at: float, answered_at: float) -> HostHealth:
    rows = {"disks": Disk, "owners": Owner, "sites": Site, "models": ModelAccess}
    values = {item.name: answer[item.name] for item in fields(HostHealth) if item.name in answer}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    values |= {name: _rows(answer[name], kind, name) for name, kind in rows.items()}
    # The question was sent before the program began, and its end was before the answer: the clocks differ by this
    ahead = (answer["ended_at"] - answered_at, answer["began_at"] - sent_at)
    cards = tuple(
        _card(index, cells) for index, cells in answer["cards"].items() if index.isdigit()
    )
    values |= {
        "cards": tuple(sorted(cards, key=lambda card: card.index)),
        "links": read_links(answer["topology"]),
    }
    return HostHealth(**values, clock_ahead_s=ahead)


def _rows(values: list[Any], kind: type[Row], name: str) -> tuple[Row, ...]:
    """Return rows as `kind`, each field of the type that it says."""
    wanted = {item.name: item.type for item in fields(kind)}  # type: ignore[arg-type]
    found = [checked(value, wanted, where=f"{name}[{at}]") for at, value in enumerate(values)]
    return tuple(kind(**{item: value[item] for item in wanted}) for value in found)


def _card(index: str, cells: Mapping[str, Any]) -> CardHealth:
    def word(name: str) -> str:
        cell = str(cells.get(name, ""))
        return "" if cell.startswith("[") else cell

    def number(name: str) -> int | None:
        return int(word(name)) if word(name).isdigit() else None

    return CardHealth(
        index=int(index),
        pcie_width=number("pcie.link.width.current"),
        pcie_width_max=number("pcie.link.width.max"),
        pcie_gen_max=number("pcie.link.gen.max"),
        ecc=word("ecc.mode.current"),
        ecc_uncorrected=number("ecc.errors.uncorrected.volatile.total"),
        ecc_corrected=number("ecc.errors.corrected.volatile.total"),
        temperature_c=number("temperature.gpu"),
        slowed_down=word("clocks_throttle_reasons.hw_slowdown") == "Active",
        remap_pending=word("remapped_rows.pending") in ("1", "Yes"),
        remap_failed=word("remapped_rows.failure") in ("1", "Yes"),
    )


def read_links(table: str) -> dict[str, str]:
    """Return the way between each two cards out of `nvidia-smi topo -m`: NV18, PIX, PXB, PHB, NODE or SYS."""
    lines = [line.split() for line in table.splitlines()]
    header = next((words for words in lines if words[:1] == ["GPU0"] and "X" not in words[1:2]), [])
    columns = [name for name in header if name.startswith("GPU") and name[3:].isdigit()]
    links = {}
    for name, *cells in (
        words for words in lines if words and words[0] in columns and words is not header
    ):
        for other, cell in zip(columns, cells, strict=False):
            if int(name[3:]) < int(other[3:]):
                links[f"{name[3:]}-{other[3:]}"] = cell
    return links
