"""`deploy resume RUN`: a new run that goes on from the last whole checkpoint of one that died, was stopped or failed.

Its config is the old one's from this machine's record, with the stages that are left and where they start. Its metrics
begin with the old run's rows up to the checkpoint, so that the curve is one.
"""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rollouts.config import Config, ConfigError
from rollouts.config.changed import changed
from rollouts.config.overrides import combinations, variants
from rollouts.manifest import manifest_problems
from rollouts.remote import slurm_start
from rollouts.remote.commands import launch_and_watch, look_at_host, new_run_id, plan_run
from rollouts.remote.errors import DeployError, TransportError, UnreachableError
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.host.open import open_transport
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan import QueueWish, SlurmOptions
from rollouts.remote.repository import Code, find_repository, read_code
from rollouts.remote.run import registry
from rollouts.remote.run.checkpoints import pull_checkpoint
from rollouts.remote.run.open_run import OpenRun, open_run
from rollouts.remote.run.place import REFERENCE, Placed, frozen_model, read_places, start_text
from rollouts.remote.run.pull import listed_checkpoints
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.resumable import Origin, find_origin, rows_before
from rollouts.remote.run.run_names import known_run
from rollouts.remote.texts import plan_text
from rollouts.run_dir import RunDir
from rollouts.view.answer import Answer
from rollouts.view.screen import Screen

# What a resumed stage takes from its checkpoint, or checks against it: an exact resume cannot follow a change of it
FIXED = (
    "model.",
    "data.sft_mixture",
    "data.rl_mixture",
    "data.shuffle_seed",
    "data.sft_order",
    "data.max_length",
    "output.mode",
    "output.source_checkpoint",
)
FIXED_OF_STAGE = (
    "optimizer.muon",
    "target_examples_per_step",
    "examples_per_step",
    "num_samples",
    "baseline",
    "sampling.seed",
)
MAY_CHANGE = ("model.compile", "model.activation_checkpointing")


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    hosts: Sequence[NamedHost]  # (): those that the run was on
    run_id: str | None
    plan_only: bool
    detach: bool
    accept_new_host_key: bool
    busy_ok: bool
    queue: QueueWish | SlurmOptions | None  # the new run waits for its turn on the host


def resume(name: str, screen: Screen, settings: Sequence[str], options: ResumeOptions) -> int:
    """Start a run on one host that goes on where another one ended early. Returns the job's exit code."""
    with as_deploy_errors() as progress:
        old = known_run(name)
        config = recorded_config(old)
        target = options.hosts[0].target if options.hosts else old.target
        slurm_start.refuse_without(old, options.queue, target)
        absent = bring_results(old, config, screen, options, elsewhere=target != old.target)
        origin = origin_of(old, config, absent)
        for note in origin.notes:
            screen.remark(f"note: {note}")
        wanted = with_settings(old, config, origin, settings)
        if not isinstance(options.queue, SlurmOptions):  # it gives as many nodes as are asked for
            wanted = on_so_many_hosts(wanted, 1, screen)
        root = find_repository(Path.cwd())
        key = options.accept_new_host_key
        with contextlib.closing(open_transport(target, accept_new_host_key=key)) as transport:
            run_id = options.run_id or new_run_id(config)
            facts = look_at_host(transport, [without_start(wanted)], run_id=run_id)
            start = start_of(
                old,
                config,
                wanted,
                origin,
                run_path=f"{facts.home}/runs/{run_id}",
                moves=target != old.target,
            )
            known = {place.at: True for place in start.places}
            facts = dataclasses.replace(facts, paths={**facts.paths, **known})
            code = read_code(root, start.config)
            planned = partial(plan_run, start.config, code, run_id=run_id, target=target)
            planned = partial(planned, busy_ok=options.busy_ok, queue=options.queue)
            plan, *others = slurm_start.plans(planned, start.config, facts, options.queue)
            plan = slurm_start.checked(plan, transport, facts)
            screen.remark(f"note: {old.run_id} goes on from {origin.name} as {run_id}")
            if options.plan_only:
                screen.show(
                    Answer(plan.to_json() | {"resumed_from": start.resumed_from}, plan_text(plan))
                )
            if plan.problems:
                raise DeployError.of(plan.problems)
            if options.plan_only:
                return 0
            for warning in (*plan.warnings, *changed_code(old, code)):
                screen.warn(warning)
            record = code.record() | record_of(old, origin, start)
            entry = registry.register(
                plan,
                start.config,
                root,
                record,
                now=time.time(),
                resumed_from=start.resumed_from,
                others=others,
            )
            progress.run_id, progress.target, progress.reached = (
                entry.run_id,
                entry.target,
                "registered",
            )
            run = OpenRun(entry, facts, transport, None, "never launched", progress)
            return launch_and_watch(run, start.config, screen, detach=options.detach)


def recorded_config(old: RunEntry) -> Config:
    """Return the config that this machine recorded of a run. Raises DeployError where it did not start it."""
    if old.adopted:
        raise DeployError(
            f"{old.run_id} was started on another machine: this one has no record of its config.",
            needed="the record of the machine that started it; what a host sent is not run from here",
            fix=f"deploy resume {old.run_id} there",
        )
    try:
        return Config.load(old.record.config)
    except (ConfigError, TypeError, KeyError, ValueError, OSError) as error:
        raise DeployError(
            f"{old.run_id}: this machine's record of its config cannot be read.",
            found=str(error),
            fix="start it anew: deploy CONFIG, with output.source_checkpoint",
        ) from None


def bring_results(
    old: RunEntry, config: Config, screen: Screen, options: ResumeOptions, *, elsewhere: bool
) -> list[str]:
    """Pull what the old run has; for a plan look, and return what is not here. DeployError: it lives, or is done.

    To go on on another host, the old one need not answer: then what is here counts.
    """
    if elsewhere and old.interrupted:
        screen.remark(
            f"note: {old.run_id} was interrupted: {old.interrupted}; what was pulled from it counts"
        )
        return []
    absent: list[str] = []
    try:
        with open_run(old.run_id, None, accept_new_host_key=options.accept_new_host_key) as run:
            refusal = _refusal(run, config)
            if refusal is None and run.trace in ("on its host", "unreadable"):
                absent = _look(run, screen) if options.plan_only else _pull(run, screen)
    except (TransportError, UnreachableError) as error:
        if not elsewhere:
            raise
        said = str(error).rstrip(".")
        screen.remark(
            f"warning: {said}. So whether {old.run_id} ended is not known; what was pulled from it counts"
        )
        return []
    if refusal is not None:
        raise refusal
    return absent


def _refusal(run: OpenRun, config: Config) -> DeployError | None:
    """Return why this run is not one to resume; None if it ended early."""
    name, row = run.entry.run_id, run.row
    if run.trace in ("never launched", "being launched"):
        return DeployError(
            f"{name} was never launched, or is about to be.", fix=f"deploy attach {name}"
        )
    if row is None:
        return None
    if row["live"] or row["state"] == "silent":
        found = f"{row['state']}, stage {row['stage']}, step {row['step']}"
        fix = f"deploy attach {name} follows it; deploy stop {name} ends it"
        return DeployError(f"{name} may be live: it is {row['state']}.", found=found, fix=fix)
    if row["state"] == "done":
        last = RunDir(Path(run.entry.run_path)).latest_checkpoint(config.stages[-1])
        return DeployError(
            f"{name} is done: nothing is left to resume.",
            fix="to train on, deploy a config with more steps and output.source_checkpoint="
            f"{shlex.quote(str(last))}",
        )
    return None


def _pull(run: OpenRun, screen: Screen) -> list[str]:
    """Pull all that comes whole; what does not is told, and is not gone on from."""
    with _told(screen):
        run.pull(screen.say)
    # also one that the run completed and did not live to name
    for path in listed_checkpoints(run.connection):
        with _told(screen):
            pull_checkpoint(run.transport, run.entry.run_path, run.entry.mirror, path)
    return []


def _look(run: OpenRun, screen: Screen) -> list[str]:
    """Return and say what of the run is not here, without pulling it: a plan touches nothing."""
    name, mirror = run.entry.run_id, run.entry.mirror
    if absent := [
        path for path in listed_checkpoints(run.connection) if not (mirror.path / path).is_dir()
    ]:
        screen.remark(
            f"note: not here of {name}, so this plan leaves it out: {', '.join(absent)}. Without --plan it is pulled"
            f" first; `deploy pull {name}` brings it now"
        )
    return absent


@contextlib.contextmanager
def _told(screen: Screen) -> Iterator[None]:
    """Print an error and go on, unless the host does not answer."""
    try:
        yield
    except (TransportError, UnreachableError):
        raise
    except DeployError as error:
        for problem in error.problems:
            screen.remark(f"note: {problem.message}")


def origin_of(old: RunEntry, config: Config, absent: Sequence[str] = ()) -> Origin:
    """Return the newest whole checkpoint of the run, else the one that it had gone on from; `absent` are not here."""
    try:
        return find_origin(old.mirror, config.stages)
    except DeployError:
        places = read_places(old)
        if old.resumed_from is None or not places or manifest_problems(Path(places[0].here)):
            if not absent:
                raise
            raise DeployError(
                f"{old.run_id} has no whole checkpoint here to go on from.",
                found=f"on {old.target}: {', '.join(absent)}",
                fix=f"deploy pull {old.run_id}, then the plan; without --plan they are pulled first",
            ) from None
        came = old.resumed_from
        return Origin(
            str(came["stage"]), int(came["step"]), Path(places[0].here), tuple(config.stages)
        )


def with_settings(old: RunEntry, config: Config, origin: Origin, settings: Sequence[str]) -> Config:
    """Return the config with `--set`. Raises DeployError for what an exact resume cannot follow."""
    if combinations(settings) > 1:
        raise DeployError(
            "deploy resume starts one run, and --set asks for several.",
            fix="name one value a field",
        )
    try:
        (found,) = variants(config, settings)
    except ConfigError as error:
        raise DeployError(str(error)) from None
    resumes = origin.stages[0] == origin.stage
    fixed = (*FIXED, *(f"{origin.stage}.{field}" for field in FIXED_OF_STAGE if resumes))
    refused = [
        path
        for path in found.values
        if any(path.startswith(start) or start.startswith(f"{path}.") for start in fixed)
        and path not in MAY_CHANGE
        and changed(config, {path: found.values[path]}) != config
    ]
    if refused:
        raise DeployError(
            f"an exact resume cannot follow a change of {', '.join(refused)}.",
            found=f"{old.run_id} was trained with other values, and {origin.name} holds their state",
            fix="leave them out; or deploy a new config with model.name set to that checkpoint: it starts anew from its"
            " weights",
        )
    return found.config


def on_so_many_hosts(config: Config, count: int, screen: Screen) -> Config:
    """Return the config for as many hosts as are named, and say so; where engines have hosts of their own as it is."""
    if count == config.job_hosts or config.engine_hosts not in ([], [0]):
        return config
    screen.remark(f"note: target.hosts={count}, as many as are named")
    fewest = min(config.target.hosts_min, count)
    return changed(config, {"target.hosts": count, "target.hosts_min": fewest})


def without_start(config: Config) -> Config:
    return changed(config, {"output.source_checkpoint": None})


@dataclass(frozen=True)
class Start:
    """What the new run starts from."""

    config: Config
    places: list[Placed]
    resumed_from: dict[str, Any]


def record_of(old: RunEntry, origin: Origin, start: Start) -> dict[str, str]:
    """Return what the new run's record has beside that of any run: its first rows, and what it starts from."""
    begins = {
        f"{registry.BEGINS}/{file}": text for file, text in rows_before(old.mirror, origin).items()
    }
    return begins | {registry.START: start_text(start.places, start.resumed_from)}


def start_of(
    old: RunEntry,
    config: Config,
    wanted: Config,
    origin: Origin,
    *,
    run_path: str,
    moves: bool,
    spreads: bool = False,
) -> Start:
    """Return the new run's config, and the checkpoints that it needs in its directory. Raises DeployError.

    `moves`: its first host is not the old run's. `spreads`: others beside it lack what lies there.
    """
    top = f"{run_path}/start"

    def placed(name: str, here: Path) -> Placed:
        here = here.resolve()
        ours = here.is_relative_to(old.mirror.path.resolve())
        there = (
            f"{old.run_path}/{here.relative_to(old.mirror.path.resolve())}"
            if ours and not moves
            else ""
        )
        return Placed(f"{top}/{name}", str(here), there)

    places = [placed(f"{origin.stage}-{origin.path.name}", origin.path)]
    mode = "+".join(origin.stages)
    fields: dict[str, Any] = {"output.mode": mode, "output.source_checkpoint": places[0].at}
    if origin.stages[0] == origin.stage == "rl":
        if (
            (moves or spreads)
            and config.model.lora is not None
            and ("sft" in config.stages or config.output.source_checkpoint)
        ):
            raise DeployError(
                f"{old.run_id} trains LoRA on the weights of a checkpoint that lies on {old.target} alone.",
                needed="its frozen weights, which the adapters' checkpoint names by their path there",
                fix=f"deploy resume {old.run_id} --remote {shlex.quote(old.target)}",
            )
        if (kl := config.rl.kl if config.rl else None) is not None:
            reference = frozen_model(old, config, kl.reference)
            if isinstance(reference, Path):
                places.append(placed(REFERENCE, reference))
                reference = places[-1].at
            fields["rl.kl.reference"] = reference
    new = changed(wanted, fields)
    if problems := new.problems():
        raise DeployError(
            f"{len(problems)} problems in the config of the resumed run.", found="\n".join(problems)
        )
    came = {
        "run_id": old.run_id,
        "stage": origin.stage,
        "step": origin.step,
        "checkpoint": origin.name,
    }
    return Start(new, places, came)


def changed_code(old: RunEntry, code: Code) -> list[str]:
    """Return a warning where the code is not the old run's: then its numbers may not be either."""
    record = code.record()["code/manifest.json"]
    with contextlib.suppress(OSError):
        if old.record.code_manifest.read_text(encoding="utf-8") == record:
            return []
    return [f"the code here is not the code of {old.run_id}: the curve may not go on as it was"]
