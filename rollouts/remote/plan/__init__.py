"""What a deploy would do, decided. Pure: config + facts + code → Plan. No clock, network or disk.

`--plan` prints the value made here; execute.py does it and decides nothing. A plan with problems is never executed.
problems.py and gpu_problems.py have the reasons against it, memory/ whether it fits into its GPUs, look_ahead.py what
the run would come to, launch_plan.py the part that the host carries out, describe.py the words.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rollouts.config import Config
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.describe import PlanStep, plan_notes, plan_steps, watch_step
from rollouts.remote.plan.environment_specs import environment_key, read_lock
from rollouts.remote.plan.gpu_problems import gpu_notes, gpu_problems, gpu_warnings
from rollouts.remote.plan.host_part import own_config, part_of, serves_far
from rollouts.remote.plan.launch_plan import launch_plan
from rollouts.remote.plan.look_ahead import ahead_problems, plan_summary, plan_warnings
from rollouts.remote.plan.memory import memory_plan
from rollouts.remote.plan.ports import (
    free_port_notes,
    free_port_problems,
    free_ports_wanted,
    with_free_ports,
)
from rollouts.remote.plan.problems import (
    host_problems,
    input_problems,
    required_paths,
    required_ports,
)
from rollouts.remote.plan.queue_wish import QueueWish, queue_notes, queue_spec, without_holders
from rollouts.remote.plan.slurm_options import SlurmOptions, option_problems
from rollouts.remote.plan.slurm_part import (
    node_path,
    on_nodes,
    slurm_notes,
    slurm_warnings,
    with_slurm,
)
from rollouts.remote.plan.torch_build import torch_problems, torch_warnings
from rollouts.remote.plan.tracker_specs import tracker_problems, tracker_warnings
from rollouts.remote.repository import Code
from rollouts.run_dir import HostGroup, LaunchPlan, QueueSpec

__all__ = [
    "Plan",
    "PlanStep",
    "QueueWish",
    "SlurmOptions",
    "environment_key",
    "free_ports_wanted",
    "make_plan",
    "read_lock",
    "required_paths",
    "required_ports",
]


@dataclass(frozen=True, kw_only=True)
class Plan:
    target: str
    run_id: str
    local_dir: str  # the mirror here
    problems: tuple[Problem, ...]  # every reason why it cannot be executed
    notes: tuple[str, ...]
    steps: tuple[PlanStep, ...]
    summary: tuple[str, ...] = ()  # what each stage reads, does and writes
    memory: tuple[str, ...] = ()  # a table of what each GPU holds in each stage
    warnings: tuple[str, ...] = ()  # what may be meant, and usually is not
    launch: LaunchPlan | None  # None if the host lacks what the plan needs (a Python)

    def to_json(self) -> dict[str, Any]:
        return {"type": "plan", **asdict(self)}


def make_plan(
    config: Config,
    facts: HostFacts,
    code: Code,
    *,
    target: str,
    run_id: str,
    local_dir: str,
    secrets_set: Collection[str],
    busy_ok: bool = False,
    queue: QueueWish | SlurmOptions | None = None,
    group: HostGroup | None = None,
) -> Plan:
    """Decide everything. `secrets_set`: those of host.secrets that have a value here; `busy_ok`: take busy GPUs too.

    `queue`: the run waits on its host for what is in use, or for Slurm, which starts it; `group`: the hosts of a job of
    several, of which this is one's plan.
    """
    slurm = queue if isinstance(queue, SlurmOptions) else None
    facts, spec, waits = _waiting(config, facts, queue, group)
    # what counts against this host of several
    own = own_config(config, part_of(config, group))
    port_notes = free_port_notes(own, facts)
    port_problems = free_port_problems(own, facts, target)
    planned, config, own = config, with_free_ports(config, facts), with_free_ports(own, facts)
    memory = memory_plan(own, facts, code, target, busy_ok=busy_ok)
    problems = (
        *host_problems(own, facts, target, run_id),
        *port_problems,
        *input_problems(config, facts, code, target, secrets_set),
        *ahead_problems(config, facts, code, target),
        *(option_problems(slurm, config) if slurm else ()),
        *(() if slurm else gpu_problems(own, facts, code, target, busy_ok=busy_ok or bool(queue))),
        *torch_problems(own, facts, code, target),
        *tracker_problems(config, code),
        *memory.problems,
    )
    locks = code.constraints is not None and code.engine_requirements is not None
    # without them, the number of hosts is a problem of its own
    named = group is not None or not serves_far(config)
    launch = None
    if facts.python and locks and named:
        path = node_path(facts, run_id, group) if slurm is not None else ""
        launch = launch_plan(config, facts, code, run_id, path=path, group=group)
        launch = with_slurm(launch, slurm, planned) if slurm else replace(launch, queue=spec)
    return Plan(
        target=target,
        run_id=run_id,
        local_dir=local_dir,
        problems=problems,
        notes=(
            *plan_notes(own, facts, code),
            *gpu_notes(own, facts),
            *memory.notes,
            *port_notes,
            *waits,
        ),
        memory=memory.table,
        summary=tuple(plan_summary(config, code)),
        warnings=(
            *plan_warnings(config, code),
            *torch_warnings(own),
            *tracker_warnings(config, secrets_set),
            *_device_warnings(own, facts, slurm, busy_ok=busy_ok),
        ),
        steps=(*plan_steps(config, facts, code, launch, target), watch_step(local_dir))
        if launch
        else (),
        launch=launch,
    )


def _waiting(
    config: Config,
    facts: HostFacts,
    queue: QueueWish | SlurmOptions | None,
    group: HostGroup | None,
) -> tuple[HostFacts, QueueSpec | None, tuple[str, ...]]:
    """Return the facts that count for a run that waits, its place in the host's own queue, and what is said of it."""
    if queue is None:
        return facts, None, ()
    if isinstance(queue, SlurmOptions):
        return on_nodes(facts, group), None, tuple(slurm_notes(queue, config))
    waits = tuple(queue_notes(config, facts, queue))
    return without_holders(facts), queue_spec(config, facts, queue), waits


def _device_warnings(
    config: Config, facts: HostFacts, slurm: SlurmOptions | None, *, busy_ok: bool
) -> Iterator[str]:
    if slurm is None:
        yield from gpu_warnings(config, facts, busy_ok=busy_ok)
    else:
        yield from slurm_warnings(slurm)
