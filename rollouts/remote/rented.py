"""`deploy CONFIG` on a rented machine: offers, a machine with its guards, the usual path, and its end."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rollouts.config import Config
from rollouts.remote import commands, several_hosts, sweep
from rollouts.remote.cloud_verbs import cloud_verb
from rollouts.remote.errors import DeployError, HostGoneError, Problem
from rollouts.remote.guards import WATCHDOGS
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.local_faults import Interrupted, as_deploy_errors
from rollouts.remote.machine_end import end_machines
from rollouts.remote.plan import QueueWish, SlurmOptions
from rollouts.remote.read_config import read_variants
from rollouts.remote.rent_machine import find_machines, limits_of, rent_machines
from rollouts.remote.rented_host import why_gone
from rollouts.remote.repository import find_repository, read_code, refuse_stray_config
from rollouts.remote.resume import ResumeOptions, origin_of, recorded_config, resume
from rollouts.remote.resume_on_several import check_from_here, resume_on_several, resume_there
from rollouts.remote.run import registry
from rollouts.remote.run.execute import read_secrets
from rollouts.remote.run.run_names import known_run, name_problems
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.remote.run_money import RunMoney
from rollouts.view.answer import Answer
from rollouts.view.screen import Screen
from rollouts.view.unread import all_the_same, output_may_close

if TYPE_CHECKING:
    from rollouts.cloud.ledger import Lease
    from rollouts.cloud.machine_types import Offer
    from rollouts.config import ProvisionConfig


NOT_REPLACED = (
    "note: nothing is rented in its place: resumes_max is for machines that a provider took"
)
STOPPED = "note: nothing is rented in its place: the run was asked to stop"


@dataclass(frozen=True, kw_only=True)
class RentOptions:
    """What a command line says beside the config."""

    plan_only: bool
    detach: bool
    run_id: str | None
    busy_ok: bool
    yes: bool
    wanted: ToBring  # what is pulled; a machine is kept while something of its run is not here
    queue: QueueWish | SlurmOptions | None = (
        None  # the run waits for its turn on the host that --remote names
    )


def deploy(
    config_path: str,
    screen: Screen,
    settings: Sequence[str],
    options: RentOptions,
    *,
    remote: str | None,
    accept_new_host_key: bool,
) -> int:
    """Plan, send, launch and watch (`deploy CONFIG`), on a rented machine where the config has one and no --remote is
    given. Returns the job's exit code."""
    with as_deploy_errors():
        config = read_variants(config_path, settings)[0].config
        refuse_stray_config(find_repository(Path.cwd()), Path(config_path))
    run_id = options.run_id or commands.new_run_id(config)
    rents = config.provision is not None and remote is None
    rents = rents and not isinstance(options.queue, SlurmOptions)
    if not rents:
        # --yes is for what is asked: a machine, or many runs
        sweep.check_alone(skip=0, yes=options.yes)
    if config.provision is not None and rents:
        return rent_and_run(config, config.provision, screen, options, run_id)
    if config.provision is not None:
        screen.remark("note: provision is not used: --remote says where the run takes place")
    return commands.start(
        config,
        screen,
        remote=remote,
        plan_only=options.plan_only,
        detach=options.detach,
        run_id=run_id,
        accept_new_host_key=accept_new_host_key,
        busy_ok=options.busy_ok,
        wanted=options.wanted,
        queue=options.queue,
    )


def rent_and_run(
    config: Config, provision: "ProvisionConfig", screen: Screen, options: RentOptions, run_id: str
) -> int:
    """Rent the cheapest machine that fits and runs, and take the run to its end there. Returns its exit code."""
    with cloud_verb():
        hosts = config.job_hosts
        offers = find_machines(provision, screen, hosts)
        hours = limits_of(provision, hosts).hours(offers[0].price_per_hour)
        if options.plan_only:
            return screen.show(_plan_answer(offers, provision, hours, hosts))
        read_secrets(config)
        # what is wrong here is told before a cent is spent
        root = find_repository(Path.cwd())
        read_code(root, config)
        place = commands.mirror_dir(config, root, run_id)
        if problems := name_problems(run_id, place):
            raise DeployError.of(problems)
        screen.remark(_plan_answer(offers, provision, hours, hosts).text or "")
        _confirm(options)
    with output_may_close(all_the_same(run_id)):
        return _to_its_end(config, provision, offers, screen, replace(options, run_id=run_id))


Start = Callable[[Sequence[str], str], int]  # (targets, run id) -> exit code


def _to_its_end(
    config: Config,
    provision: "ProvisionConfig",
    offers: "Sequence[Offer]",
    screen: Screen,
    options: RentOptions,
) -> int:
    """Run the job on rented machines, after one that was taken away on the next, as often as the config says."""
    assert options.run_id is not None, "the run has a name by now"
    hosts = config.job_hosts

    def anew(targets: Sequence[str], run_id: str) -> int:
        if len(targets) > 1:
            named = [NamedHost(target) for target in targets]
            return several_hosts.start_on(config, screen, named, _on_several(run_id, options))
        return commands.start(
            config,
            screen,
            remote=targets[0],
            detach=options.detach,
            run_id=run_id,
            accept_new_host_key=False,
            busy_ok=options.busy_ok,
            wanted=options.wanted,
        )

    start: Start = anew
    lost = list[str]()  # the runs whose machines were taken
    money = RunMoney(provision, hosts)
    for resumed in itertools.count(1):
        name = options.run_id if resumed == 1 else f"{options.run_id}-again{resumed - 1}"
        try:
            wish = _Wish(provision, hosts, offers, money)
            return on_the_first_that_works(wish, screen, name, start)
        except HostGoneError as error:
            lost.append(error.run_id)
            why_not = "" if error.gone.taken else NOT_REPLACED
            why_not = STOPPED if _stop_asked(lost) else why_not
            if resumed <= provision.resumes_max and why_not:
                screen.remark(why_not)
            if resumed > provision.resumes_max or why_not:
                raise
            screen.remark(error.text(launching=False))
            start = unless_stopped(_going_on(error.run_id, config, screen, options) or anew, lost)
            with cloud_verb():
                offers = find_machines(provision, screen, hosts)
    raise AssertionError("counting does not end")


def _stop_asked(run_ids: Sequence[str]) -> bool:
    """Return whether somebody asked one of these runs to stop."""
    return any((entry := registry.find(name)) and entry.stop_asked for name in run_ids)


def unless_stopped(start: Start, lost: Sequence[str]) -> Start:
    """Return what starts a run in the place of lost ones, unless a stop came while its machine was rented."""

    def begin(targets: Sequence[str], run_id: str) -> int:
        if _stop_asked(lost):
            raise Interrupted(f"{lost[-1]} was asked to stop, and {run_id} is not started.")
        return start(targets, run_id)

    return begin


def _on_several(run_id: str, options: RentOptions) -> several_hosts.StartOptions:
    return several_hosts.StartOptions(
        run_id, False, options.detach, False, options.busy_ok, options.wanted, None
    )


def _going_on(run_id: str, config: Config, screen: Screen, options: RentOptions) -> Start | None:
    """Return what goes on from the last checkpoint of an interrupted run that is here; None where none is."""
    old = registry.find(run_id)
    assert old is not None, "it was followed"
    try:
        origin = origin_of(old, config)
    except DeployError:
        screen.remark(f"note: no whole checkpoint of {run_id} is here: it begins anew")
        return None
    screen.remark(f"note: {run_id} goes on from {origin.name}")
    return _resuming(run_id, screen, (), options)


def _resuming(old: str, screen: Screen, settings: Sequence[str], options: RentOptions) -> Start:
    """Return what goes on from a run's last checkpoint, on these targets and under a name."""

    def start(targets: Sequence[str], run_id: str) -> int:
        if len(targets) > 1:
            return resume_on_several(old, screen, targets, _on_several(run_id, options))
        wanted = ResumeOptions(
            hosts=[NamedHost(targets[0])],
            run_id=run_id,
            plan_only=False,
            detach=options.detach,
            accept_new_host_key=False,
            busy_ok=options.busy_ok,
            queue=None,
        )
        return resume(old, screen, settings, wanted)

    return start


def resume_run(
    name: str, screen: Screen, settings: Sequence[str], options: ResumeOptions, *, yes: bool
) -> int:
    """Go on from the last checkpoint of a run (`deploy resume RUN`). Returns the exit code.

    One whose rented machine is gone goes on on the next offer for its config, unless --remote names a host.
    """
    with as_deploy_errors():
        old = known_run(name)
        gone = bool(old.interrupted) or why_gone(old.target) is not None
        rents = not options.hosts and gone
        config = recorded_config(old) if rents else None
        provision = None if config is None else config.provision
        if config is not None and provision is not None:
            check_from_here(old, config)  # before a cent is spent
    if config is None or provision is None:
        return resume_there(name, screen, settings, options)
    hosts = config.job_hosts
    if hosts > 1 and settings:
        raise DeployError("--set changes a resumed run on one machine.", fix="leave it out")
    with cloud_verb():
        offers = find_machines(provision, screen, hosts)
        hours = limits_of(provision, hosts).hours(offers[0].price_per_hour)
        answer = _plan_answer(offers, provision, hours, hosts)
        if options.plan_only:
            return screen.show(answer)
        screen.remark(answer.text or "")
        rent = RentOptions(
            plan_only=False,
            detach=options.detach,
            run_id=options.run_id or commands.new_run_id(config),
            busy_ok=options.busy_ok,
            yes=yes,
            wanted=EVERYTHING,
        )
        _confirm(rent)
    start = _resuming(old.run_id, screen, settings, rent)
    with output_may_close(all_the_same(rent.run_id or "")):
        wish = _Wish(provision, hosts, offers, RunMoney(provision, hosts))
        return on_the_first_that_works(wish, screen, rent.run_id or "", start)


@dataclass(frozen=True)
class _Wish:
    """What is to be rented: so many machines of one of these offers, the first that works."""

    provision: "ProvisionConfig"
    hosts: int
    offers: "Sequence[Offer]"
    money: RunMoney


def on_the_first_that_works(wish: _Wish, screen: Screen, run_id: str, start: Start) -> int:
    """Rent the machines of one offer after another until a run starts on them. Returns its exit code."""
    provision, reasons = wish.provision, list[Problem]()
    tried = wish.offers[: 1 + provision.retries_max]
    for attempt, offer in enumerate(tried):
        name = f"{run_id}{f'-{attempt + 1}' if attempt else ''}"
        try:
            with cloud_verb():
                allowed = wish.money.for_next(name, offer.price_per_hour)
                if allowed is not provision:
                    left = f"${allowed.spend_max:.2f} of ${provision.spend_max:.2f}"
                    screen.remark(f"note: spend_max is for all machines of the run: {left} is left")
                leases = rent_machines(offer, allowed, name, screen, wish.hosts)
            with _ended_if_nothing_starts(leases, name, screen):
                return start([lease.name for lease in leases], name)
        except DeployError as error:
            if not may_try_another(error):
                raise
            reasons += error.problems
            screen.remark(f"{offer.provider} {offer.gpu_type}: {error.problems[0].text()}")
    message = f"none of {len(tried)} offer(s) could be used; all machines are ended."
    raise DeployError(message, needed="provision.retries_max tries further offers", more=reasons)


def may_try_another(error: DeployError) -> bool:
    """Return whether another machine may do better, and none is left behind that may bill unseen."""
    from rollouts.cloud.cloud_errors import CloudError

    if isinstance(error, CloudError):
        return error.kind in ("no capacity", "refused")
    return not error.started and error.exit_code == 2


def _plan_answer(
    offers: "Sequence[Offer]", provision: "ProvisionConfig", hours: float, hosts: int = 1
) -> Answer:
    from rollouts.cloud.machine_types import PRIVATE_NETWORKS
    from rollouts.cloud.offer_table import offer_json

    first, most = offers[0], hours * offers[0].price_per_hour * hosts
    each = f"{hosts} machines, each " if hosts > 1 else ""
    memory = "" if first.vram_gb is None else f", {first.vram_gb:g} GB each"
    then = {"end": "ended after the last verified pull", "keep": "kept"}[provision.when_done]
    lines = [
        f"machine   {first.provider}: {each}{first.gpus} x {first.gpu_type}{memory}, {first.region}",
        f"price     ${first.price_per_hour:.2f} an hour, at most ${most:.2f}: after {hours:.2f} h a guard ends it",
        f"end       {then}",
        f"guard     {', '.join(_guards(first, provision))}",
    ]
    if hosts > 1:
        without = [name for name in provision.providers if name not in PRIVATE_NETWORKS]
        note = f"; left out, having none: {', '.join(without)}" if without else ""
        lines.insert(1, f"network   the private one of {first.provider}'s region{note}")
    others = offers[1 : 1 + provision.retries_max]
    lines += [
        f"else      {o.provider}: {o.gpu_type}, ${o.price_per_hour:.2f} an hour" for o in others
    ]
    document = {
        "machine": offer_json(first),
        "hosts": hosts,
        "price_per_hour": first.price_per_hour,
        "hours_max": hours,
        "spend_max": most,
        "else": [offer_json(offer) for offer in others],
    }
    return Answer(document, "\n".join(lines))


def _guards(offer: "Offer", provision: "ProvisionConfig") -> list[str]:
    """Return the guards that the machine would have, in words."""
    guards = ["a process on this computer"]
    guards += [f"another on {provision.guard_host}"] if provision.guard_host else []
    guards += ["one on the machine"] if offer.provider in WATCHDOGS else []
    guards += ["RunPod itself"] if offer.provider == "runpod" else []
    if provision.idle_minutes_max is not None:
        guards[0] += f", which ends it after {provision.idle_minutes_max:g} idle minutes too"
    return guards


def _confirm(options: RentOptions) -> None:
    """Ask whether to rent. Raises DeployError where nobody can be asked, or the answer is no."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise DeployError(
            "renting a machine costs money.",
            fix="--yes rents without asking; --plan shows the machine",
        )
    sys.stderr.write("rent it? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DeployError("nothing was rented.")


@contextlib.contextmanager
def _ended_if_nothing_starts(
    leases: "Sequence[Lease]", run_id: str, screen: Screen
) -> Iterator[None]:
    """End the machines where the run did not start on them, and drop the run: an error, or Ctrl-C before the launch."""
    try:
        yield
    except DeployError as error:
        if not error.started:
            for lease in leases:
                screen.say("end", f"{lease.name}: the run did not start there")
            end_machines([lease.name for lease in leases], reason=error.problems[0].message[:300])
            if entry := registry.find(run_id):
                registry.forget(entry)
            error.standing = ""
        raise
