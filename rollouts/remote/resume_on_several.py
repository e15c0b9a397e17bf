"""A run that goes on from another's checkpoint on several hosts: the first one has the checkpoint, or gets it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from rollouts.config import Config
from rollouts.remote import resume
from rollouts.remote.errors import DeployError
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.resume import ResumeOptions
from rollouts.remote.run.last_seen import last_seen
from rollouts.remote.run.other_hosts import targets_of
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.resumable import Origin
from rollouts.remote.run.run_names import known_run
from rollouts.remote.run.wanted import EVERYTHING
from rollouts.remote.several_hosts import Begin, Beginning, StartOptions, start_on
from rollouts.view.screen import Screen


def check_from_here(old: RunEntry, config: Config) -> None:
    """Raise DeployError for a run whose machine is gone, and that is done, or has no whole checkpoint here."""
    if last_seen(old)["state"] == "done":
        raise DeployError(
            f"{old.run_id} is done: nothing is left to resume.",
            fix="to train on, deploy a config with more steps and output.source_checkpoint",
        )
    resume.origin_of(old, config)


def resume_there(name: str, screen: Screen, settings: Sequence[str], options: ResumeOptions) -> int:
    """Go on with a run on the hosts that are named, else on those that it was on. Returns the job's exit code."""
    with as_deploy_errors():
        old = known_run(name)
        hosts = options.hosts or [NamedHost(target) for target in targets_of(old)]
        if len(hosts) == 1:
            return resume.resume(name, screen, settings, options)
        config = resume.recorded_config(old)
        moves = hosts[0].target != old.target
        absent = resume.bring_results(old, config, screen, options, elsewhere=moves)
        origin = resume.origin_of(old, config, absent)
        wanted = resume.with_settings(old, config, origin, settings)
        wanted = resume.on_so_many_hosts(wanted, len(hosts), screen)
    chosen = StartOptions(
        options.run_id,
        options.plan_only,
        options.detach,
        options.accept_new_host_key,
        options.busy_ok,
        EVERYTHING,
        options.queue,
    )
    _tell(old, origin, screen)
    begin = _beginning(old, config, wanted, origin, moves=moves)
    return start_on(resume.without_start(wanted), screen, hosts, chosen, begin)


def resume_on_several(
    name: str, screen: Screen, targets: Sequence[str], options: StartOptions
) -> int:
    """Start a run on these hosts that goes on from what is here of another one. Returns the job's exit code."""
    with as_deploy_errors():
        old = known_run(name)
        config = resume.recorded_config(old)
        origin = resume.origin_of(old, config)
    named = [NamedHost(target) for target in targets]
    _tell(old, origin, screen)
    begin = _beginning(old, config, config, origin, moves=named[0].target != old.target)
    return start_on(resume.without_start(config), screen, named, options, begin)


def _beginning(
    old: RunEntry, config: Config, wanted: Config, origin: Origin, *, moves: bool
) -> Begin:
    """Return what says, for a directory on the first host, what the new run starts with.

    Unless it `moves`, that host has the checkpoint already, and it is not sent if its hashes hold there.
    """

    def begin(run_path: str) -> Beginning:
        where: dict[str, Any] = {"run_path": run_path, "moves": moves, "spreads": True}
        start = resume.start_of(old, config, wanted, origin, **where)
        return Beginning(
            start.config,
            resume.record_of(old, origin, start),
            start.resumed_from,
            tuple(place.at for place in start.places),
            partial(resume.changed_code, old),
        )

    return begin


def _tell(old: RunEntry, origin: Origin, screen: Screen) -> None:
    for note in (*origin.notes, f"{old.run_id} goes on from {origin.name}"):
        screen.remark(f"note: {note}")
