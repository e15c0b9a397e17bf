"""What `deploy doctor` prints: a row for each thing that was measured, then what is wrong, each with its fix. Pure."""

import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rollouts.machine.nvidia_smi import GpuProcess
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.host_health import CardHealth, Disk, HostHealth
from rollouts.remote.texts import fact_rows
from rollouts.view.escape import one_line

NAME_CHARS = 8
WIDTH_MAX = 118


@dataclass(frozen=True)
class Findings:
    """What was found on a host. `facts` is None for one that could not be asked, `health` where it has no Python."""

    target: str
    facts: HostFacts | None
    health: HostHealth | None
    way: str  # how it is reached, and why so
    stops: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def doctor_text(found: Findings, *, width: int) -> str:
    """Return it as lines of at most `width` columns; a long word, such as a path, is not cut."""
    width = min(width, WIDTH_MAX)
    rows = [("way", found.way)] if found.way else []
    rows += [*fact_rows(found.facts)] if found.facts else []
    rows += [*_health_rows(found.health, found.facts)] if found.health and found.facts else []
    parts = ["\n".join([found.target, *(_row(name, value, width) for name, value in rows)])]
    parts += [_problem("error", problem, width) for problem in found.stops]
    parts += [_problem("warning", problem, width) for problem in found.warnings]
    count = len(found.stops)
    parts.append(
        f"{count} problem{'s stop' if count > 1 else ' stops'} a run."
        if count
        else "Nothing stops a run."
    )
    return "\n\n".join(parts)


def _row(name: str, value: str, width: int) -> str:
    return _wrapped(f"  {name:<{NAME_CHARS}} ", one_line(value, limit=4000), width)


def _wrapped(head: str, text: str, width: int) -> str:
    lines = textwrap.wrap(
        text, width - len(head), break_long_words=False, break_on_hyphens=False
    ) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])])


def _problem(kind: str, problem: Problem, width: int) -> str:
    lines = [_wrapped(f"{kind}: ", problem.message, width)]
    for name, value in (("found", problem.found), ("needed", problem.needed), ("fix", problem.fix)):
        heads = [f"  {name:<7} ", *[" " * 10] * value.count("\n")]
        lines += [
            _wrapped(head, line, width)
            for head, line in zip(heads, value.splitlines(), strict=False)
        ]
    return "\n".join(lines)


def _health_rows(health: HostHealth, facts: HostFacts) -> Iterator[tuple[str, str]]:
    allowed = (
        f", {health.cores_allowed:g} for this user" if health.cores_allowed < health.cores else ""
    )
    yield "cores", f"{health.cores}{allowed}"
    limit = (
        f", at most {_gib(health.memory_limit_mib)} for this user"
        if health.memory_limit_mib
        else ""
    )
    if health.memory_mib:
        yield "memory", f"{_gib(health.memory_free_mib)} of {_gib(health.memory_mib)} free{limit}"
    for disk in health.disks:
        yield "disk", _disk(disk)
    yield "limits", _limits(health)
    yield "clock", _clock(health)
    for site in health.sites:
        yield (
            ("index" if site.kind == "package index" else site.kind),
            _site(site.url, site.seconds, site.problem),
        )
    if health.offline:
        yield "hub", "not asked: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set there"
    for model in health.models:
        yield "model", f"{model.name}: {model.state}{', with a token' if model.token else ''}"
    for card in health.cards:
        yield f"gpu {card.index}", _card(card)
    if health.links:
        yield "links", _links(health)
    owners = {owner.pid: (owner.user, owner.started_at) for owner in health.owners}
    for process in facts.gpu_processes:
        yield "holder", _holder(process, facts, owners.get(process.pid))


def _gib(mib: int) -> str:
    return f"{mib / 1024:.1f} GiB"


def _disk(disk: Disk) -> str:
    rate = f", {disk.write_mib_s:.0f} MiB/s written" if disk.write_mib_s is not None else ""
    problem = f": {disk.problem}" if disk.problem else ""
    room = f"{_gib(disk.free_mib)} of {_gib(disk.total_mib)} free"
    return f"{disk.path} ({disk.name}){problem}, {disk.file_system}, {room}{rate}"


def _limits(health: HostHealth) -> str:
    def shown(limits: tuple[int | None, ...], unit: str = "") -> str:
        return " to ".join(
            dict.fromkeys("no limit" if limit is None else f"{limit}{unit}" for limit in limits)
        )

    return (
        f"open files {shown(health.open_files)}, processes {shown(health.processes)},"
        f" locked memory {shown(health.locked_kib, ' KiB')}, file size {shown(health.file_mib, ' MiB')}"
    )


def _clock(health: HostHealth) -> str:
    least, most = health.clock_ahead_s
    if least <= 0 <= most:
        return f"as here, within {max(-least, most):.1f} s"
    off, way = (least, "ahead") if least > 0 else (-most, "behind")
    return f"at least {off:.1f} s {way}"


def _site(url: str, seconds: float | None, problem: str) -> str:
    return (
        f"{url}: {problem}" if problem or seconds is None else f"{url} answers in {seconds:.2f} s"
    )


def _card(card: CardHealth) -> str:
    words = []
    if card.pcie_width is not None:
        generation = f" of generation {card.pcie_gen_max}" if card.pcie_gen_max else ""
        words.append(f"PCIe{generation}, {card.pcie_width} of {card.pcie_width_max} lanes")
    if card.ecc:
        counts = f", {card.ecc_uncorrected or 0} errors not corrected, {card.ecc_corrected or 0} corrected"
        words.append(
            f"ECC {'on' if card.ecc == 'Enabled' else 'off'}{counts if card.ecc == 'Enabled' else ''}"
        )
    words += [f"{card.temperature_c} °C"] if card.temperature_c is not None else []
    return "; ".join(words) or "tells nothing more"


def _links(health: HostHealth) -> str:
    """Name each kind of way between cards, NVLink first."""
    by_kind: dict[str, list[str]] = {}
    for pair, kind in health.links.items():
        by_kind.setdefault(kind, []).append(pair)
    if len(by_kind) == 1 and len(health.links) > 1:
        return f"{_kind(next(iter(by_kind)))} between all cards"
    kinds = sorted(by_kind, key=lambda kind: not kind.startswith("NV"))
    return "; ".join(f"{_kind(kind)} between {', '.join(by_kind[kind])}" for kind in kinds)


def _kind(kind: str) -> str:
    if kind.startswith("NV") and kind[2:].isdigit():
        return f"{kind[2:]} NVLinks"
    ways = {"PIX": "one PCIe switch", "PXB": "several PCIe switches", "PHB": "PCIe through the CPU"}
    ways |= {"NODE": "PCIe within a NUMA node", "SYS": "PCIe across CPU sockets"}
    return f"{ways[kind]} ({kind})" if kind in ways else kind


def _holder(process: GpuProcess, facts: HostFacts, owner: tuple[str, float] | None) -> str:
    index = next((str(gpu.index) for gpu in facts.gpus if gpu.uuid == process.gpu_uuid), "?")
    memory = f", {process.memory_mib} MiB" if process.memory_mib is not None else ""
    since = (
        f", of {owner[0]}, since {time.strftime('%Y-%m-%d %H:%M', time.localtime(owner[1]))}"
        if owner
        else ""
    )
    return f"GPU {index}: pid {process.pid} {process.name}{memory}{since}"
