"""`deploy CONFIG` on a rented machine: offers, a machine with its guards, the usual path, and its end."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rollouts.config import Config
from rollouts.remote import commands, sweep
from rollouts.remote.cloud_verbs import cloud_verb
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.machine_end import end_machine
from rollouts.remote.plan import QueueWish
from rollouts.remote.read_config import read_variants
from rollouts.remote.repository import find_repository, read_code, refuse_stray_config
from rollouts.remote.run import registry
from rollouts.remote.run.execute import read_secrets
from rollouts.remote.run.wanted import ToBring
from rollouts.view.answer import Answer
from rollouts.view.screen import Screen

if TYPE_CHECKING:
    from rollouts.cloud.ledger import Lease
    from rollouts.cloud.machine_types import Offer
    from rollouts.config import ProvisionConfig

LOGIN_TIMEOUT_S = 30.0
WATCHDOGS = ("runpod", "vast")  # whose machines have a key that ends them, and nothing else


@dataclass(frozen=True, kw_only=True)
class RentOptions:
    """What a command line says beside the config."""

    plan_only: bool
    detach: bool
    run_id: str | None
    busy_ok: bool
    yes: bool
    wanted: ToBring  # what is pulled; a machine is kept while something of its run is not here
    queue: QueueWish | None = None  # the run waits for its turn on the host that --remote names


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
    if not rents:
        sweep.check_alone(skip=0, yes=options.yes)  # --yes is for what is asked: a machine, or many runs
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
        offers = find_machines(provision, screen)
        hours = min(provision.hours_max, *(provision.spend_max / offer.price_per_hour for offer in offers[:1]))
        if options.plan_only:
            return screen.show(_plan_answer(offers, provision, hours))
        read_secrets(config)
        read_code(find_repository(Path.cwd()), config)  # what is wrong here is told before a cent is spent
        screen.remark(_plan_answer(offers, provision, hours).text or "")
        _confirm(options)
    reasons: list[Problem] = []
    for attempt, offer in enumerate(offers[: 1 + provision.retries_max]):
        name = run_id if attempt == 0 else f"{run_id}-{attempt + 1}"
        try:
            with cloud_verb():
                lease = rent_machine(offer, provision, name, screen)
            with _ended_if_nothing_starts(lease, name, screen):
                return commands.start(
                    config,
                    screen,
                    remote=lease.name,
                    detach=options.detach,
                    run_id=name,
                    accept_new_host_key=False,
                    busy_ok=options.busy_ok,
                    wanted=options.wanted,
                )
        except DeployError as error:
            if not may_try_another(error):
                raise
            reasons += error.problems
            screen.remark(f"{offer.provider} {offer.gpu_type}: {error.problems[0].text()}")
    message = f"none of {min(len(offers), 1 + provision.retries_max)} machine(s) could be used; all are ended."
    raise DeployError(message, needed="provision.retries_max tries further offers", more=reasons)


def may_try_another(error: DeployError) -> bool:
    """Return whether another machine may do better, and none is left behind that may bill unseen."""
    from rollouts.cloud.cloud_errors import CloudError

    if isinstance(error, CloudError):
        return error.kind in ("no capacity", "refused")
    return not error.started and error.exit_code == 2


def find_machines(provision: "ProvisionConfig", screen: Screen) -> "list[Offer]":
    """Return the offers that fit, in the order in which they are tried. Raises DeployError where there are none."""
    import anyio

    from rollouts.cloud.accounts import find_offers, no_key
    from rollouts.cloud.machine_types import MachineNeeds

    needs = MachineNeeds(
        gpu_types=tuple(provision.gpu_types),
        gpus=provision.gpus,
        vram_gb_min=provision.gpu_memory_gb_min or None,
        price_per_hour_max=provision.price_per_hour_max,
        regions=tuple(provision.regions),
        spot=provision.spot,
        disk_gib=provision.disk_gib,
        image=provision.image,
    )
    asked = anyio.run(find_offers, needs, tuple(provision.providers))
    for error in asked.problems.values():
        screen.remark(f"error: {error.problems[0].text()}")
    fitting = [offer for offer in asked.offers if not offer.left_out]
    if not asked.offers and not asked.problems:
        raise no_key(asked.without_key)
    if not fitting:
        nearest = [f"{o.provider} {o.gpu_type} ${o.price_per_hour:.2f}: {o.left_out}" for o in asked.offers[:5]]
        raise DeployError(
            "no provider offers a machine that fits provision.",
            found="\n".join(nearest) or "nothing at all",
            fix="`deploy offers` shows what there is; raise price_per_hour_max, or name other GPUs",
        )
    return fitting


def _plan_answer(offers: "Sequence[Offer]", provision: "ProvisionConfig", hours: float) -> Answer:
    from rollouts.cloud.offer_table import offer_json

    first, most = offers[0], hours * offers[0].price_per_hour
    memory = "" if first.vram_gb is None else f", {first.vram_gb:g} GB each"
    then = {"end": "ended after the last verified pull", "keep": "kept"}[provision.when_done]
    lines = [
        f"machine   {first.provider}: {first.gpus} x {first.gpu_type}{memory}, {first.region}",
        f"price     ${first.price_per_hour:.2f} an hour, at most ${most:.2f}: after {hours:.2f} h a guard ends it",
        f"end       {then}",
        f"guard     a process on this computer{', and one on the machine' if first.provider in WATCHDOGS else ''}",
    ]
    others = offers[1 : 1 + provision.retries_max]
    lines += [f"else      {o.provider}: {o.gpu_type}, ${o.price_per_hour:.2f} an hour" for o in others]
    document = {
        "machine": offer_json(first),
        "price_per_hour": first.price_per_hour,
        "hours_max": hours,
        "spend_max": most,
        "else": [offer_json(offer) for offer in others],
    }
    return Answer(document, "\n".join(lines))


def _confirm(options: RentOptions) -> None:
    """Ask whether to rent. Raises DeployError where nobody can be asked, or the answer is no."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise DeployError("renting a machine costs money.", fix="--yes rents without asking; --plan shows the machine")
    sys.stderr.write("rent it? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DeployError("nothing was rented.")


def rent_machine(offer: "Offer", provision: "ProvisionConfig", run_id: str, screen: Screen) -> "Lease":
    """Rent the machine of an offer, with its guards armed and an SSH login. Raises CloudError; then it is ended."""
    import anyio

    from rollouts.cloud.accounts import keys_here, open_providers
    from rollouts.cloud.lease_guard import start_guard
    from rollouts.cloud.ledger import Ledger, Terms
    from rollouts.cloud.machine_types import Order
    from rollouts.cloud.reaching import own_public_key, reach
    from rollouts.cloud.renting import Patience, end, new_machine_name, rent

    name, ledger, patience = new_machine_name(), Ledger(), Patience()
    hours = min(provision.hours_max, provision.spend_max / offer.price_per_hour)
    order = Order(
        name=name,
        offer=offer,
        public_key=own_public_key(),
        disk_gib=provision.disk_gib,
        image=provision.image,
    )

    terms = Terms(run_id=run_id, hours=hours, keep=provision.when_done == "keep", arm=start_guard)

    async def make() -> None:
        async with open_providers(keys_here([offer.provider])[0]) as providers:
            provider = providers[offer.provider]
            screen.say("rent", f"{name} at {offer.provider}, ${offer.price_per_hour:.2f} an hour")
            await rent(provider, order, ledger, patience, terms)
            try:
                lease = ledger.lease(name)
                await reach(
                    provider,
                    lease,
                    lambda: log_in(name),
                    timeout_s=provision.ready_timeout_s,
                    price_max=provision.price_per_hour_max,
                    say=lambda text: screen.say("wait", text),
                )
                if offer.provider in WATCHDOGS:
                    await anyio.to_thread.run_sync(arm_watchdog, lease)
            except BaseException as error:
                with anyio.CancelScope(shield=True):
                    await end(provider, ledger.lease(name), ledger, patience, reason=str(error)[:300])
                raise

    anyio.run(make)
    return ledger.lease(name)


def log_in(name: str) -> str:
    """Log in to a machine by its name, and pin its host key at the first time. Returns what is wrong, or ""."""
    try:
        with contextlib.closing(open_transport(name, accept_new_host_key=True)) as transport:
            transport.run(["true"], timeout_s=LOGIN_TIMEOUT_S)
    except DeployError as error:
        return error.problems[0].message
    return ""


def arm_watchdog(lease: "Lease") -> None:
    """Start the watchdog on a machine. Raises CloudError where it cannot be armed."""
    from rollouts.cloud.cloud_errors import CloudError
    from rollouts.cloud.provider_api import base_url

    assert lease.until is not None and lease.machine_id is not None, "a machine with an end"
    path = {"runpod": "/pods/{}", "vast": "/api/v0/instances/{}/"}[lease.provider].format(lease.machine_id)
    arguments = (lease.provider, f"{base_url(lease.provider)}{path}", f"{max(0.0, lease.until - time.time()):.0f}")
    with contextlib.closing(open_transport(lease.name)) as transport:
        python = gather_facts(transport).python
        if python is None:
            raise CloudError(f"{lease.name} has no Python 3.10 or newer.", kind="no capacity")
        argv, program = sent_program(python, "rollouts.cloud.watchdog", *arguments)
        done = transport.run(argv, stdin=program, timeout_s=LOGIN_TIMEOUT_S)
        said = read_answer(lease.name, "the watchdog", done.out, {"armed": bool, "problem": str})
    if not said["armed"]:
        raise CloudError(
            f"{lease.name}: its guard cannot be armed.",
            kind="no capacity",
            found=f"{said['problem']} {done.err[-300:]}",
        )


@contextlib.contextmanager
def _ended_if_nothing_starts(lease: "Lease", run_id: str, screen: Screen) -> Iterator[None]:
    """End the machine where the run did not start on it, and drop the run: an error, or Ctrl-C before the launch."""
    try:
        yield
    except DeployError as error:
        if not error.started:
            screen.say("end", f"{lease.name}: the run did not start there")
            end_machine(lease.name, reason=error.problems[0].message[:300])
            if entry := registry.find(run_id):
                registry.forget(entry)
            error.standing = ""
        raise
