"""The processes of one host that serve: its engines, their router, and what takes weights for them. Pure."""

import posixpath

from rollouts.config import BroadcastSync, Config, DiskSync
from rollouts.engines.command_lines import (
    engine_argv,
    engine_devices,
    ready_url,
    receiver_argv,
    receiver_ready_url,
    router_argv,
    router_ready_url,
    router_url,
    sent_model_path,
    url_of,
)
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.host_part import EnginePlace, engine_places, part_of, serves_far
from rollouts.remote.plan.process_env import engine_process_env, process_env
from rollouts.remote.repository import Code
from rollouts.run_dir import HostGroup, ModelToSend, ProcessSpec, RunDir


def serving_processes(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    *,
    python: str,
    after_sft: bool,
    group: HostGroup | None,
) -> list[ProcessSpec]:
    """Return this host's engines, and on the first host the router in front of all of the job's."""
    rank, places = part_of(config, group).rank, engine_places(config, group)
    if rank != 0 and comes_from_first(config, after_sft=after_sft):
        model = sent_model_path(str(run.weights))
    else:
        model = _start_model(config, code, run, after_sft=after_sft)
    found = [
        _engine(config, facts, code, run, place, python=python, model=model, group=group)
        for place in places
        if place.rank == rank
    ]
    if rank == 0 and places and places[0].engine.router_port is not None:
        found.append(_router(config, facts, code, run, places, python=python))
    return found


def trainer_urls(config: Config, group: HostGroup | None) -> list[str]:
    """Return the trainer's arguments, on the first host: where all engines of the job are."""
    places, engine = engine_places(config, group), config.engine
    words = [word for place in places for word in ("--engine-url", place.url)]
    for url in receivers(config, group):
        words += ["--receiver-url", url]
    if engine is not None and places and (router := router_url(engine)) is not None:
        words += ["--router-url", router]
    return words


def far_ready_urls(config: Config, group: HostGroup | None) -> list[str]:
    """Return the URLs by which the first host sees that it reaches engines of other hosts."""
    places = [place for place in engine_places(config, group) if place.rank != 0]
    return [ready_url(place.engine, place.replica, host=place.host) for place in places]


def receivers(config: Config, group: HostGroup | None) -> list[str]:
    """Return the URLs of what takes weights for engines: one on each host that has some, but for the first."""
    if group is None or not serves_far(config):
        return []
    hosts = [group.hosts[rank] for rank in config.engine_hosts if rank != 0]
    return [url_of(host.address, host.receiver_port or 0) for host in hosts]


def receiver(
    config: Config, facts: HostFacts, code: Code, run: RunDir, *, group: HostGroup | None
) -> ProcessSpec | None:
    """Return what takes weights for this host's engines; None on the first host, which has the weights."""
    part = part_of(config, group)
    if group is None or part.rank == 0 or not part.serves:
        return None
    assert facts.python is not None and config.engine is not None
    host, sync = group.hosts[part.rank], config.engine.weight_sync
    port = host.receiver_port or 0
    in_memory = isinstance(sync, DiskSync) and sync.on_tmpfs
    argv = receiver_argv(
        facts.python,
        host.address,
        port,
        weights=str(run.weights),
        versions=str(run.weights_in_memory if in_memory else run.weights),
    )
    return ProcessSpec(
        window="receiver",
        argv=list(argv),
        env=process_env(config, facts, code, run, []),
        ready_url=receiver_ready_url(host.address, port),
        ready_timeout_s=config.limits.engine_ready_timeout_s,
    )


def model_to_send(
    config: Config, code: Code, run: RunDir, *, after_sft: bool, group: HostGroup | None
) -> ModelToSend | None:
    """Return the model that engines of other hosts start with and that the first host alone has; None for none.

    `run` is this host's: the first one's counts, and is read there alone.
    """
    urls = receivers(config, group)
    if not urls or not comes_from_first(config, after_sft=after_sft):
        return None
    return ModelToSend(
        directory=_start_model(config, code, run, after_sft=after_sft), receivers=urls
    )


def comes_from_first(config: Config, *, after_sft: bool) -> bool:
    """Return whether the policy that RL starts from is a checkpoint, which the first host alone has."""
    return after_sft or config.output.source_checkpoint is not None


def collective_group(config: Config, group: HostGroup | None) -> HostGroup | None:
    """Return the group where collectives go between hosts, so that they listen on its interface; else None."""
    engine = config.engine
    broadcasts = (
        serves_far(config) and engine is not None and isinstance(engine.weight_sync, BroadcastSync)
    )
    return group if config.target.hosts > 1 or broadcasts else None


def _engine(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    place: EnginePlace,
    *,
    python: str,
    model: str,
    group: HostGroup | None,
) -> ProcessSpec:
    engine = place.engine
    assert config.rl is not None
    argv = engine_argv(
        engine,
        config.model,
        python=python,
        model_path=model,
        device_type=config.target.device_type,
        # each replica of the job has its own: the command line adds its number on its host
        seed=config.rl.sampling.seed + place.number - place.replica,
        replica=place.replica,
        host=place.host,
    )
    devices = engine_devices(engine, place.replica)
    joins = collective_group(config, group) if serves_far(config) else None
    return ProcessSpec(
        window=f"engine-{place.number}",
        argv=list(argv),
        env=engine_process_env(config, facts, code, run, devices, group=joins),
        ready_url=ready_url(engine, place.replica, host=place.host),
        ready_timeout_s=config.limits.engine_ready_timeout_s,
        tools_of=posixpath.dirname(posixpath.dirname(python)),
    )


def _router(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    places: list[EnginePlace],
    *,
    python: str,
) -> ProcessSpec:
    """Return the router's process. It is started and watched like the engines, and is ready once they are."""
    engine, urls = places[0].engine, [place.url for place in places]
    argv = router_argv(
        engine, urls, python=python, request_timeout_s=config.limits.sample_timeout_s
    )
    return ProcessSpec(
        window="router",
        argv=list(argv),
        env=process_env(config, facts, code, run, []),
        ready_url=router_ready_url(engine),
        ready_timeout_s=config.limits.engine_ready_timeout_s,
    )


def _start_model(config: Config, code: Code, run: RunDir, *, after_sft: bool) -> str:
    """Return what the engine of the RL stage serves first: the policy that RL starts from."""
    if after_sft:
        return str(run.latest_checkpoint("sft"))
    if config.output.source_checkpoint:
        return config.output.source_checkpoint
    name = config.model.name
    return (
        posixpath.join(str(run.code_tree), posixpath.normpath(name))
        if code.named.get(name) == "sent"
        else name
    )
