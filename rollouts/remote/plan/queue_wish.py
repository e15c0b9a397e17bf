"""A run that waits for its turn in the host's queue: what it may take, and what is no reason against it. Pure."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from rollouts.config import Config
from rollouts.machine.nvidia_smi import Gpu, is_free
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.gpu_problems import card_problems, is_given, named_gpus
from rollouts.remote.plan.ports import free_ports_wanted
from rollouts.run_dir import NamedGpu, QueueSpec


@dataclass(frozen=True, kw_only=True)
class QueueWish:
    """What --wait and --queue ask for."""

    any_gpus: (
        bool  # as many as the config names, of all that are like them; else those that it names
    )
    at_once: int = 1  # of a run without GPUs: it starts where fewer such runs are under way


def queue_spec(config: Config, facts: HostFacts, wish: QueueWish) -> QueueSpec:
    """Return how the run waits on its host."""
    on_gpus = config.target.device_type == "cuda"
    count = free_ports_wanted(config)
    first = facts.free_port if count else None
    return QueueSpec(
        cards=[NamedGpu(index=gpu.index, uuid=gpu.uuid) for gpu in _candidates(config, facts, wish)]
        if on_gpus
        else [],
        at_once=wish.at_once,
        ports=[first + offset for offset in range(count)] if first is not None else [],
    )


def without_holders(facts: HostFacts) -> HostFacts:
    """Return the facts without ports that others have, or will have: the run waits for them."""
    return dataclasses.replace(
        facts, ports_in_use=(), runs=tuple({**row, "ports": []} for row in facts.runs)
    )


def queue_notes(config: Config, facts: HostFacts, wish: QueueWish) -> Iterator[str]:
    """Say what the run would wait for."""
    if config.target.device_type == "cuda":
        candidates = _candidates(config, facts, wish)
        busy = [gpu.index for gpu in candidates if not is_free(gpu, facts.gpu_processes)]
        count, indices = len(named_gpus(config, facts)), [gpu.index for gpu in candidates]
        what = f"{count} of the GPUs {indices}" if len(indices) > count else f"the GPUs {indices}"
        yield f"in the host's queue it waits for {what}" + (
            f"; {busy} are busy now" if busy else ", all free now"
        )
    else:
        others = "no other runs" if wish.at_once == 1 else f"fewer than {wish.at_once} runs"
        yield f"in the host's queue it waits until {others} without GPUs are under way there"
    if facts.ports_in_use:
        yield f"in the host's queue it waits for the ports {list(facts.ports_in_use)}, in use now"


def _candidates(config: Config, facts: HostFacts, wish: QueueWish) -> list[Gpu]:
    """Return the cards by which the run may be placed: what was planned for the named ones has to hold on them."""
    named = named_gpus(config, facts)
    kinds = {_kind(gpu) for gpu in named}
    if not wish.any_gpus or len(kinds) != 1 or "CUDA_VISIBLE_DEVICES" in config.host.env:
        return named
    return [
        gpu
        for gpu in facts.gpus
        if gpu in named
        or (_kind(gpu) in kinds and is_given(gpu, facts) and not [*card_problems(gpu, "")])
    ]


def _kind(gpu: Gpu) -> tuple[str, int, str, str, bool]:
    """Return in what cards have to be alike; all of them or none have a UUID by which they are named."""
    has_uuid = gpu.uuid.startswith("GPU-")
    return gpu.name, gpu.memory_total_mib, gpu.compute_capability, gpu.compute_mode, has_uuid
