"""`deploy CONFIG --slurm FILE`: the options file, and what the login host's Slurm says of the job before it is sent."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rollouts.config import Config
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.slurm_facts import ask_slurm, refusal, slurm_problems
from rollouts.remote.host.transport import Transport
from rollouts.remote.plan import Plan, QueueWish, SlurmOptions
from rollouts.remote.plan.slurm_options import read_options
from rollouts.remote.plan.slurm_part import node_group
from rollouts.remote.run.registry import RunEntry

OPTIONS_BYTES_MAX = 1 << 16


def read_options_file(path: Path) -> SlurmOptions:
    """Return what the options file says. Raises DeployError with every line that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(
            f"--slurm {path}: the file cannot be read.",
            found=str(error),
            needed="lines such as `#SBATCH --partition=gpu --time=12:00:00`",
        ) from None
    options, problems = read_options(text[:OPTIONS_BYTES_MAX], str(path))
    if problems:
        raise DeployError.of(problems)
    return options


def refuse_without(old: RunEntry, queue: QueueWish | SlurmOptions | None, target: str) -> None:
    """Raise DeployError where a run of Slurm's would go on on the login host itself."""
    by_slurm = not old.adopted and old.launch.slurm is not None
    if by_slurm and target == old.target and not isinstance(queue, SlurmOptions):
        raise DeployError(
            f"{old.run_id} was a job of Slurm: without --slurm it would go on on {target} itself.",
            fix=f"deploy resume {old.run_id} --slurm FILE",
        )


def plans(
    plan_one: Callable[..., Plan],
    config: Config,
    facts: HostFacts,
    queue: QueueWish | SlurmOptions | None,
) -> list[Plan]:
    """Return the plan of a run; of a job of several nodes one for each, the first with the reasons against all.

    `plan_one(facts, group=…)` plans one.
    """
    group = node_group(config) if isinstance(queue, SlurmOptions) else None
    if group is None:
        return [plan_one(facts)]
    ranks = range(len(group.hosts))
    found = [plan_one(facts, group=replace(group, rank=rank)) for rank in ranks]
    problems = tuple(dict.fromkeys(problem for plan in found for problem in plan.problems))
    return [replace(found[0], problems=problems), *found[1:]]


def checked(plan: Plan, transport: Transport, facts: HostFacts) -> Plan:
    """Return the plan with what the login host's Slurm says of its job. Raises TransportError."""
    if plan.launch is None or plan.launch.slurm is None:
        return plan
    slurm = ask_slurm(transport, facts.path, facts.home)
    problems: list[Problem] = [*slurm_problems(slurm, plan.target)]
    notes, warnings = list(plan.notes), list(plan.warnings)
    if not problems:
        script = plan.launch.slurm.script
        refused, said = refusal(transport, facts.path, script, slurm, plan.target)
        problems += [refused] if refused else []
        notes += [f"Slurm says: {said}"] if said else []
    if slurm.is_local_disk:
        warnings.append(
            f"{facts.home} is on a disk of {plan.target} itself ({slurm.disk}). The job's nodes have to see it:"
            " if they do not, set ROLLOUTS_HOME there to a shared directory"
        )
    return replace(
        plan,
        problems=(*plan.problems, *problems),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
