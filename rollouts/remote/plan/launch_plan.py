"""The launch plan: what the host carries out, as data. Pure: config + facts + code → LaunchPlan."""

import dataclasses
from pathlib import Path

from rollouts.config import Config
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.engine_processes import (
    collective_group,
    comes_from_first,
    far_ready_urls,
    model_to_send,
    receiver,
    serving_processes,
    trainer_urls,
)
from rollouts.remote.plan.environment_specs import environments_of
from rollouts.remote.plan.host_part import HostPart, part_of
from rollouts.remote.plan.process_env import engine_process_env, package_path, process_env
from rollouts.remote.plan.smoke_specs import engine_check, trainer_check
from rollouts.remote.plan.tracker_specs import tracker_specs
from rollouts.remote.repository import Code
from rollouts.run_dir import (
    SMOKE_STAGE,
    EnvironmentSpec,
    HostGroup,
    HubModel,
    LaunchPlan,
    ProcessSpec,
    RunDir,
    SmokeCheck,
    StageSpec,
    run_path,
)

PYTHONPATH = "PYTHONPATH"
NETWORK_TIMEOUT_S = (
    180.0  # seconds are usual; the first start of torch from a slow disk takes a minute or two
)


def launch_plan(
    config: Config,
    facts: HostFacts,
    code: Code,
    run_id: str,
    *,
    path: str = "",
    group: HostGroup | None = None,
) -> LaunchPlan:
    """Decide environments, command lines and time limits of the run; of one host's part, in a `group` of several.

    `path`: the run's directory, where it is not the usual one.
    """
    assert facts.python is not None
    path = path or str(run_path(facts.home, run_id))
    part = part_of(config, group)
    environments = _environments(config, facts, code, part)
    pythons = [f"{environment.path}/bin/python" for environment in environments]
    return LaunchPlan(
        run_id=run_id,
        experiment_name=config.output.experiment_name,
        home=facts.home,
        run_path=path,
        base_python=facts.python,
        environments=environments,
        stages=[
            _stage(
                config,
                facts,
                code,
                stage,
                path,
                python=pythons[0],
                engine_python=pythons[-1],
                group=group,
            )
            for stage in config.stages
        ],
        bootstrap_timeout_s=config.limits.bootstrap_timeout_s,
        stop_grace_s=config.limits.stop_grace_s,
        engine_restarts_max=config.engine.restarts_max if config.engine else 0,
        engine_hang_timeout_s=config.limits.engine_hang_timeout_s,
        restarts_max=config.limits.restarts_max,
        models=_hub_models(config, code, part),
        smoke=_smoke(config, facts, code, RunDir(Path(path)), environments=environments, part=part),
        package_path=package_path(code, RunDir(Path(path))),
        group=group,
        network=_network_check(
            config, facts, code, RunDir(Path(path)), group=group, python=pythons[0]
        )
        if group and part.trains and config.target.hosts > 1
        else None,
        # the records of the run lie on the first host
        trackers=tracker_specs(config, facts, code, RunDir(Path(path))) if part.rank == 0 else [],
    )


def _environments(
    config: Config, facts: HostFacts, code: Code, part: HostPart
) -> list[EnvironmentSpec]:
    """Return the trainer's environment where ranks run, then the engine's own, if it has a lock, where engines do."""
    trainer, *engine = environments_of(config, facts, code)
    if not part.serves:
        return [trainer]
    return [trainer, *engine] if part.trains else (engine or [trainer])


def _smoke(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    *,
    environments: list[EnvironmentSpec],
    part: HostPart,
) -> list[SmokeCheck]:
    """Try each environment that a stage uses on this host, on the devices that it gets there."""
    if config.target.device_type == "mps":  # no Linux: nothing runs there
        return []
    engine, checks = config.engine if part.serves else None, []
    of_engine = [one for one in environments if one.name == "engine"]
    if (trainer := environments[0]).name == "trainer":
        if not part.trains and engine is not None:  # the engine alone runs in it
            target = dataclasses.replace(config.target, gpu_ranks=engine.gpu_ranks)
            config = dataclasses.replace(config, target=target)
        python, ranks = f"{trainer.path}/bin/python", config.target.gpu_ranks
        several = len(ranks) > 1
        start = _torchrun(config, run, SMOKE_STAGE, python, None) if several else (python,)
        env = process_env(config, facts, code, run, ranks)
        shared = engine is not None and not of_engine
        checks.append(
            trainer_check(config, facts, run, trainer, start=start, env=env, has_engine=shared)
        )
    if engine is not None and of_engine:
        devices = sorted(set(engine.gpu_ranks))
        env = engine_process_env(config, facts, code, run, devices)
        checks.append(engine_check(config, facts, run, of_engine[0], env=env))
    return checks


def _hub_models(config: Config, code: Code, part: HostPart) -> list[HubModel]:
    """List what the hub is asked for: names that are not paths, of the model and of a KL reference that is used.

    A host that only serves needs the model alone, and that only where no other host sends it one.
    """
    if not part.trains and comes_from_first(config, after_sft="sft" in config.stages):
        return []
    rl = config.rl if "rl" in config.stages and part.trains else None
    weights = config.model.init == "pretrained" and config.output.source_checkpoint is None
    named = {config.model.name: weights}
    if rl is not None and rl.kl is not None and rl.kl.reference is not None:
        named[rl.kl.reference] = True
    return [
        HubModel(name=name, weights=whole)
        for name, whole in named.items()
        if code.named.get(name) == "missing"
    ]


def _stage(
    config: Config,
    facts: HostFacts,
    code: Code,
    stage: str,
    path: str,
    *,
    python: str,
    engine_python: str,
    group: HostGroup | None,
) -> StageSpec:
    """Return a stage of this host: ranks of the trainer where it trains, engines where it serves, checkpoints on the
    first host."""
    run, part = RunDir(Path(path)), part_of(config, group)
    after_sft, leads = stage == "rl" and "sft" in config.stages, part.rank == 0
    samples = stage == "rl" and config.uses_engine
    trainer = ProcessSpec(
        window="trainer",
        argv=[
            *_torchrun(config, run, stage, python, group if config.target.hosts > 1 else None),
            *("-m", "rollouts.worker.trainer", "--run-dir", path, "--stage", stage),
            *(trainer_urls(config, group) if samples and leads else ()),
        ],
        env=process_env(
            config,
            facts,
            code,
            run,
            config.target.gpu_ranks,
            group=collective_group(config, group),
        ),
        ready_url=None,
        ready_timeout_s=0.0,
    )
    engines = serving_processes(
        config, facts, code, run, python=engine_python, after_sft=after_sft, group=group
    )
    return StageSpec(
        name=stage,  # type: ignore[arg-type]
        engines=engines if samples else [],
        trainer=trainer if part.trains else None,
        timeout_s=config.limits.stage_timeout_s,
        needs_checkpoint=str(run.latest_checkpoint("sft")) if after_sft and leads else None,
        receiver=receiver(config, facts, code, run, group=group) if samples else None,
        send=model_to_send(config, code, run, after_sft=after_sft, group=group)
        if samples
        else None,
        far_ready_urls=far_ready_urls(config, group) if samples and leads else [],
    )


def _torchrun(
    config: Config, run: RunDir, stage: str, python: str, group: HostGroup | None
) -> tuple[str, ...]:
    """Start ranks that find each other through files of the run directory; on several hosts through a store that
    listens at the private address of the first alone.

    torchrun's own store (`--standalone`) listens on every address, and unpickles whatever is written into it.
    """
    ranks = str(len(config.target.gpu_ranks))
    if group is not None:
        return (
            *(
                python,
                "-m",
                "rollouts.training.bound_torchrun",
                "--rdzv-backend",
                "static",
                "--rdzv-id",
                run.run_id,
            ),
            *("--master-addr", group.leader.address, "--master-port", str(group.trainer_port)),
            *(
                "--nnodes",
                str(config.target.hosts),
                "--node-rank",
                str(group.rank),
                "--nproc-per-node",
                ranks,
            ),
        )
    return (
        *(python, "-m", "torch.distributed.run"),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-id", run.run_id),
        *("--rdzv-endpoint", str(run.rendezvous(stage)), "--local-addr", "127.0.0.1"),
        *("--nnodes", "1", "--nproc-per-node", ranks),
    )


def _network_check(
    config: Config, facts: HostFacts, code: Code, run: RunDir, *, group: HostGroup, python: str
) -> SmokeCheck:
    """Have all ranks of all hosts meet once, as a stage's do, and measure the way between them."""
    argv = [
        *_torchrun(config, run, SMOKE_STAGE, python, group),
        *("-m", "rollouts.training.network_check", "--device", config.target.device_type),
        *("--report", str(run.smoke_report("network"))),
    ]
    env = process_env(config, facts, code, run, config.target.gpu_ranks, group=group)
    process = ProcessSpec(window="network", argv=argv, env=env, ready_url=None, ready_timeout_s=0.0)
    names = ", ".join(f"{host.name} at {host.address}" for host in group.hosts if host.trains)
    timeout_s = min(NETWORK_TIMEOUT_S, config.limits.bootstrap_timeout_s)
    return SmokeCheck(
        process=process, timeout_s=timeout_s, marker="", subject=f"the network between {names}"
    )
