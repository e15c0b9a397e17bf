"""What a deploy would do, decided. Pure: config + facts + code → Plan. No clock, network or disk.

`--plan` prints the value made here; execute.py does it and decides nothing. A plan with problems is never executed.
problems.py and gpu_problems.py have the reasons against it, memory/ whether it fits into its GPUs, look_ahead.py what
the run would come to, launch_plan.py the part that the host carries out, describe.py the words.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from rollouts.config import Config
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.describe import PlanStep, plan_notes, plan_steps, watch_step
from rollouts.remote.plan.gpu_problems import gpu_notes, gpu_problems, gpu_warnings
from rollouts.remote.plan.launch_plan import environment_key, launch_plan, read_lock
from rollouts.remote.plan.look_ahead import ahead_problems, plan_summary, plan_warnings
from rollouts.remote.plan.memory import memory_plan
from rollouts.remote.plan.ports import free_port_notes, free_port_problems, free_ports_wanted, with_free_ports
from rollouts.remote.plan.problems import host_problems, input_problems, required_paths, required_ports
from rollouts.remote.plan.queue_wish import QueueWish, queue_notes, queue_spec, without_holders
from rollouts.remote.plan.torch_build import torch_problems, torch_warnings
from rollouts.remote.repository import Code
from rollouts.run_dir import HostGroup, LaunchPlan

__all__ = [
    "Plan",
    "PlanStep",
    "QueueWish",
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
    queue: QueueWish | None = None,
    group: HostGroup | None = None,
) -> Plan:
    """Decide everything. `secrets_set`: those of host.secrets that have a value here; `busy_ok`: take busy GPUs too.

    `queue`: the run waits on its host for what is in use; `group`: the hosts of a job of several, of which this is
    one's plan.
    """
    waits = tuple(queue_notes(config, facts, queue)) if queue is not None else ()
    spec = queue_spec(config, facts, queue) if queue is not None else None
    facts = without_holders(facts) if queue is not None else facts
    port_notes, port_problems = free_port_notes(config, facts), free_port_problems(config, facts, target)
    config = with_free_ports(config, facts)
    memory = memory_plan(config, facts, code, target, busy_ok=busy_ok)
    problems = (
        *host_problems(config, facts, target, run_id),
        *port_problems,
        *input_problems(config, facts, code, target, secrets_set),
        *ahead_problems(config, facts, code, target),
        *gpu_problems(config, facts, code, target, busy_ok=busy_ok or queue is not None),
        *torch_problems(config, facts, code, target),
        *memory.problems,
    )
    locks = code.constraints is not None and code.engine_requirements is not None
    launch = launch_plan(config, facts, code, run_id, group=group) if facts.python and locks else None
    launch = replace(launch, queue=spec) if launch is not None else None
    return Plan(
        target=target,
        run_id=run_id,
        local_dir=local_dir,
        problems=problems,
        notes=(*plan_notes(config, facts, code), *gpu_notes(config, facts), *memory.notes, *port_notes, *waits),
        memory=memory.table,
        summary=tuple(plan_summary(config, code)),
        warnings=(*plan_warnings(config, code), *torch_warnings(config), *gpu_warnings(config, facts, busy_ok=busy_ok)),
        steps=(*plan_steps(config, facts, code, launch, target), watch_step(local_dir)) if launch else (),
        launch=launch,
    )
