"""What is wrong with a host beside what its facts tell: disks, limits, clock, network, models, cards. Pure.

A `stops` problem keeps a run from its end; a warning costs time, or stops some runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.host_health import CardHealth, Disk, HostHealth, ModelAccess

FREE_FILES_MIN = 100_000  # an environment with torch has about 30,000 files
FREE_MIB_MIN = 2 << 10
OPEN_FILES_MIN = 1024
PROCESSES_MIN = 1024
MEMORY_FREE_MIB_MIN = 2 << 10
WRITE_MIB_S_MIN = 50.0
CLOCK_S_MAX = 60.0


@dataclass(frozen=True)
class Diagnosis:
    """Why runs would stop on a host, and what is worth knowing."""

    stops: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def diagnose(facts: HostFacts, health: HostHealth, target: str, *, reuses: bool) -> Diagnosis:
    """Judge what was measured. `reuses`: the environments that runs need are there, and no index is asked."""
    found = [
        *(rule for disk in health.disks for rule in _disk(disk, target)),
        *_limits(health, target),
        *_clock(health, target),
        *_network(health, target, reuses=reuses),
        *(rule for model in health.models for rule in _model(model, health, target)),
        *(rule for card in health.cards for rule in _card(card, facts, target)),
    ]
    return Diagnosis(
        stops=tuple(problem for stops, problem in found if stops),
        warnings=tuple(problem for stops, problem in found if not stops),
    )


Rules = Iterator[tuple[bool, Problem]]  # does it stop a run?, what


def _disk(disk: Disk, target: str) -> Rules:
    needed = {
        "home": "a directory of this user's for code, environments and results",
        "tmp": "room for sockets and installers",
        "shm": "room for weights on their way, and for secrets",
    }[disk.name]
    if disk.problem:
        yield (
            disk.name != "shm",
            Problem(
                f"{target}: nothing can be written to {disk.path}.",
                found=disk.problem,
                needed=needed,
                fix={
                    "home": "make it this user's, or set ROLLOUTS_HOME on the host to another directory",
                    "tmp": "mend its rights on the host, or set TMPDIR there",
                    "shm": "mount a tmpfs there (in a container: --shm-size=8g)",
                }[disk.name],
            ),
        )
        return
    if disk.name == "home":
        yield from _home(disk, target)
    if disk.name != "shm" and disk.free_mib < FREE_MIB_MIN:
        yield (
            False,
            Problem(
                f"{target}: {disk.path} is almost full.",
                found=f"{disk.free_mib} of {disk.total_mib} MiB free",
                needed="about 10 GiB for an environment with torch, and room for checkpoints",
                fix="free some space there, or set ROLLOUTS_HOME (TMPDIR for tmp) on the host to a larger disk",
            ),
        )
    if disk.name != "shm" and disk.free_files is not None and disk.free_files < FREE_FILES_MIN:
        yield (
            disk.free_files == 0,
            Problem(
                f"{target}: {disk.path} has room for few more files.",
                found=f"{disk.free_files} inodes free",
                needed="about 30,000 files for an environment with torch",
                fix="remove old environments there (~/.rollouts/envs), or ask for a larger quota of files",
            ),
        )


def _home(disk: Disk, target: str) -> Rules:
    if not disk.runs_programs:
        yield (
            True,
            Problem(
                f"{target}: no program can be run from {disk.path}.",
                found=f"{disk.file_system}, mounted noexec",
                needed="environments lie there, with their Python",
                fix="set ROLLOUTS_HOME on the host to a directory on another disk",
            ),
        )
    if not disk.locks:
        yield (
            True,
            Problem(
                f"{target}: files in {disk.path} cannot be locked.",
                found=f"flock fails on {disk.file_system}",
                needed="a lock tells a run that lives from one that died",
                fix="set ROLLOUTS_HOME on the host to a local disk, or mount that one with locks",
            ),
        )
    if disk.write_mib_s is not None and disk.write_mib_s < WRITE_MIB_S_MIN:
        yield (
            False,
            Problem(
                f"{target}: {disk.path} is slow.",
                found=f"{disk.write_mib_s:.0f} MiB/s reach the disk ({disk.file_system})",
                needed=f"{WRITE_MIB_S_MIN:.0f} MiB/s or more: checkpoints and environments are gigabytes",
                fix="set ROLLOUTS_HOME on the host to a faster disk",
            ),
        )


def _limits(health: HostHealth, target: str) -> Rules:
    wanted = (
        (
            "open files",
            "nofile",
            health.open_files[1],
            OPEN_FILES_MIN,
            "each request to an engine is one",
        ),
        (
            "processes",
            "nproc",
            health.processes[0],
            PROCESSES_MIN,
            "threads count, and torch starts many",
        ),
    )
    for what, name, limit, least, why in wanted:
        if limit is not None and limit < least:
            yield (
                False,
                Problem(
                    f"{target}: this user may have {limit} {what}.",
                    found=f"ulimit: {limit}",
                    needed=f"{least} or more: {why}",
                    fix=f"raise `{name}` for this user in /etc/security/limits.conf on the host",
                ),
            )
    if (size := health.file_mib[0]) is not None:
        yield (
            False,
            Problem(
                f"{target}: no file may be larger than {size} MiB.",
                needed="checkpoints of any size",
                fix="`ulimit -f unlimited` in the host's start-up files, or `fsize` in /etc/security/limits.conf",
            ),
        )
    if health.memory_mib > 0 and health.memory_free_mib < MEMORY_FREE_MIB_MIN:
        yield (
            False,
            Problem(
                f"{target}: little memory is free.",
                found=f"{health.memory_free_mib} of {health.memory_mib} MiB",
                needed="a few GiB beside the weights",
                fix="end what uses it there: `ps aux --sort=-rss`",
            ),
        )


def _clock(health: HostHealth, target: str) -> Rules:
    least, most = health.clock_ahead_s
    if most < -CLOCK_S_MAX or least > CLOCK_S_MAX:
        off, way = (least, "ahead of") if least > 0 else (-most, "behind")
        yield (
            False,
            Problem(
                f"{target}: its clock is {off:.0f} s {way} this machine's.",
                needed="clocks within a minute: certificates have dates, and a run's age is told by them",
                fix="let both follow a time server (`timedatectl set-ntp true`)",
            ),
        )


def _network(health: HostHealth, target: str, *, reuses: bool) -> Rules:
    main = next((site for site in health.sites if site.kind == "package index"), None)
    for site in health.sites:
        if not site.problem:
            continue
        index = site.kind == "package index"
        yield (
            site is main and not reuses,
            Problem(
                f"{target} does not reach the {site.kind} {site.url}.",
                found=site.problem,
                needed="packages come from there when an environment is built"
                if index
                else "models and data sets that are named by a hub id come from there",
                fix="set PIP_INDEX_URL in host.env (or pip.conf on the host) to an index that it reaches, or a proxy"
                " (https_proxy)"
                if index
                else "set HF_ENDPOINT or https_proxy in host.env; or copy models there and name their directories",
            ),
        )


def _model(model: ModelAccess, health: HostHealth, target: str) -> Rules:
    sent = "a token was sent" if model.token else "no token was sent"
    if model.state == "gated":
        yield (
            True,
            Problem(
                f"the model {model.name} is gated, and may not be read from {target}.",
                found=f"{model.problem}; {sent}",
                needed="a token of an account that accepted its licence",
                fix="accept the licence on the model's page, export HF_TOKEN here, and put 'HF_TOKEN' into"
                " host.secrets",
            ),
        )
    elif model.state == "missing":
        yield (
            True,
            Problem(
                f"the hub lacks a model {model.name}, or this account may not read it.",
                found=f"{model.problem}; {sent}",
                fix="check the name; for a private one export HF_TOKEN here, and put 'HF_TOKEN' into host.secrets",
            ),
        )
    elif model.state == "unknown" and not any(
        site.kind == "hub" and site.problem for site in health.sites
    ):
        yield (
            False,
            Problem(
                f"whether the model {model.name} may be read from {target} is not known.",
                found=f"{model.problem}; {sent}",
                fix="run again; a model that lies in the host's cache of the hub needs no answer",
            ),
        )


def _card(card: CardHealth, facts: HostFacts, target: str) -> Rules:
    name = next((gpu.name for gpu in facts.gpus if gpu.index == card.index), "")
    who = f"{target}: GPU {card.index} ({name})"
    reset = f"on the host, as root and with nothing on the card: nvidia-smi -i {card.index} -r; or reboot it"
    if card.ecc_uncorrected:
        yield (
            False,
            Problem(
                f"{who} had memory errors that could not be corrected.",
                found=f"{card.ecc_uncorrected} since the driver was loaded",
                needed="0: each of them ends the process that reads there",
                fix=f"{reset}; replace a card where they come back",
            ),
        )
    if card.remap_failed or card.remap_pending:
        found = (
            "replacing bad rows failed"
            if card.remap_failed
            else "bad rows are replaced at the next reset"
        )
        fix = "have the card replaced" if card.remap_failed else reset
        yield False, Problem(f"{who} has bad memory.", found=f"remapped rows: {found}", fix=fix)
    if card.slowed_down:
        yield (
            False,
            Problem(
                f"{who} is slowed down by its hardware.",
                found="clocks_throttle_reasons.hw_slowdown: Active"
                + (f", {card.temperature_c} °C" if card.temperature_c is not None else ""),
                needed="full clocks",
                fix="look at its cooling and power: `nvidia-smi -q -d PERFORMANCE,TEMPERATURE`",
            ),
        )
    if card.pcie_width and card.pcie_width_max and card.pcie_width < card.pcie_width_max:
        yield (
            False,
            Problem(
                f"{who} has {card.pcie_width} of {card.pcie_width_max} PCIe lanes.",
                needed="all of them, where the slot has them: weights and batches go over them",
                fix="if the slot has more, seat the card or its riser anew; `lspci -vv` shows LnkSta beside LnkCap",
            ),
        )
