"""Whether a job fits into its GPUs' memory, before it starts. Pure: config + facts + code → table, problems, notes.

training_memory.py and engine_memory.py have the sums, uses.py puts them together for each GPU and stage, fit.py finds
what does not fit and the nearest change that does, words.py says it. No card is asked: the facts tell what is free.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rollouts.config import Config
from rollouts.machine.nvidia_smi import GPU_FREE_SHARE_MIN, Gpu, is_broken, is_free
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.inputs.shapes import Shape, shape_named
from rollouts.remote.plan.memory.engine_memory import Card
from rollouts.remote.plan.memory.fit import misfits, nearest_change
from rollouts.remote.plan.memory.uses import Models, gpu_uses
from rollouts.remote.plan.memory.words import gib, memory_lines, memory_notes, misfit_problems
from rollouts.remote.repository import Code

__all__ = ["Card", "MemoryPlan", "Models", "memory_plan", "models_of"]
MIB = 2**20


@dataclass(frozen=True)
class MemoryPlan:
    table: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def memory_plan(
    config: Config, facts: HostFacts, code: Code, target: str, *, busy_ok: bool = False
) -> MemoryPlan:
    """Plan the memory of the run. `busy_ok`: of busy cards what is free counts."""
    models = models_of(config, code)
    if config.target.device_type != "cuda":
        return MemoryPlan(notes=_host_note(config, facts, models))
    there = {gpu.index: _card(gpu, busy_ok=busy_ok) for gpu in facts.gpus if not is_broken(gpu)}
    named = {
        *config.target.gpu_ranks,
        *(config.engine.gpu_ranks if config.engine and config.uses_engine else ()),
    }
    cards = {index: card for index, card in there.items() if index in named}
    found = list(gpu_uses(config, models, cards))
    lacking = misfits(config, models, cards)
    free = {gpu.index for gpu in facts.gpus if is_free(gpu, facts.gpu_processes)}
    spare = {
        index: card for index, card in there.items() if index in free and card.have is not None
    }
    change = nearest_change(config, models, cards, spare) if lacking else None
    names = {gpu.index: gpu.name for gpu in facts.gpus}
    return MemoryPlan(
        table=tuple(memory_lines(found, cards)),
        problems=tuple(misfit_problems(config, lacking, change, names, target)),
        notes=tuple(memory_notes(found, cards)),
    )


def models_of(config: Config, code: Code) -> Models:
    """Return the shapes of the run's models, as far as their files here, or the hub's table, tell them."""
    rl, inputs = config.rl, code.inputs
    policy = shape_named(config.model.name, inputs.model_configs)
    reference: Shape | str | None = None
    if rl is not None and "rl" in config.stages and rl.kl is not None:
        reference = (
            shape_named(rl.kl.reference, inputs.model_configs) if rl.kl.reference else policy
        )
    return Models(policy=policy, reference=reference, parameters=inputs.parameters)


def _card(gpu: Gpu, *, busy_ok: bool) -> Card:
    """Return what a job can have of a card. A slice of MIG tells no size: nvidia-smi's figures are the whole card's."""
    if gpu.mig == "Enabled" or not gpu.memory_total_mib:
        return Card(have=None, total=None)
    # else it is busy: another problem
    is_whole = gpu.memory_free_mib >= GPU_FREE_SHARE_MIN * gpu.memory_total_mib
    have = gpu.memory_free_mib if is_whole or busy_ok else gpu.memory_total_mib
    return Card(have=have * MIB, total=gpu.memory_total_mib * MIB)


def _host_note(config: Config, facts: HostFacts, models: Models) -> tuple[str, ...]:
    """Say that a run without GPUs needs more than the host's memory; all of its processes share it."""
    if facts.ram_mib is None or isinstance(models.policy, str):
        return ()
    have, ranks = facts.ram_mib * MIB, _positions(config)
    cards = {index: Card(have=have, total=have) for index in ranks}
    stages: Mapping[str, int] = {
        stage: sum(use.needed for use in gpu_uses(config, models, cards) if use.stage == stage)
        for stage in config.stages
    }
    return tuple(
        f"memory in the {stage} stage: about {gib(needed)} GiB, and the host has {gib(have)} in all"
        for stage, needed in stages.items()
        if needed > have
    )


def _positions(config: Config) -> set[int]:
    engine = config.engine if config.uses_engine else None
    return {*config.target.gpu_ranks, *(engine.gpu_ranks if engine else ())}
