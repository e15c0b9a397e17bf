"""The launch plan: what the host carries out, as data. Pure: config + facts + code → LaunchPlan."""

import hashlib
import json
import posixpath
from collections.abc import Collection
from pathlib import Path

from rollouts.config import Config
from rollouts.engines.command_lines import (
    LOOPBACK_ONLY,
    engine_argv,
    engine_devices,
    engine_env,
    engine_url,
    group_env,
    ready_url,
    router_argv,
    router_ready_url,
    router_url,
)
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.smoke_specs import engine_check, trainer_check
from rollouts.remote.plan.torch_build import base_python, engine_build, trainer_build
from rollouts.remote.repository import Code
from rollouts.run_dir import (
    GPUS_VARIABLE,
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
NETWORK_TIMEOUT_S = 180.0  # seconds are usual; the first start of torch from a slow disk takes a minute or two


def environment_key(
    requirements: Collection[str],
    constraints: str,
    installer: str,
    python_version: str,
    platform: str,
    *,
    no_deps: Collection[str] = (),
    torch_build: str = "index",
    torch_fallback: bool = False,
) -> str:
    """Name an environment by what it holds: equal inputs, equal environment."""
    parts: list[object] = [sorted(requirements), constraints, installer, python_version, platform]
    if no_deps:
        parts.append(sorted(no_deps))
    if torch_build != "index":
        parts.append({"torch_build": torch_build, "falls_back": torch_fallback})
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_lock(text: str) -> tuple[list[str], list[str]]:
    """Return (requirements, those marked `# no-deps`) of a requirements file, without comments and empty lines."""
    plain: list[str] = []
    no_deps: list[str] = []
    for line in text.splitlines():
        requirement, _, comment = line.partition(" #")
        if requirement.strip() and not requirement.lstrip().startswith("#"):
            (no_deps if comment.strip().startswith("no-deps") else plain).append(requirement.strip())
    return plain, no_deps


def _environment(
    name: str,
    config: Config,
    facts: HostFacts,
    requirements: list[str],
    *,
    constraints: str,
    no_deps: list[str],
) -> EnvironmentSpec:
    installer, is_engine = config.host.installer, name == "engine"
    python = base_python(config, facts, engine=is_engine)
    torch = (engine_build if is_engine else trainer_build)(config, facts)
    key = environment_key(
        requirements,
        constraints,
        installer,
        python.version,
        facts.platform,
        no_deps=no_deps,
        torch_build=torch.build,
        torch_fallback=torch.falls_back,
    )
    return EnvironmentSpec(
        name=name,
        path=f"{facts.home}/envs/{key}",
        installer=installer,
        base_python=python.path,
        requirements=requirements,
        requirements_no_deps=no_deps,
        constraints=constraints,
        torch_build=torch.build,
        torch_fallback=torch.falls_back,
        python_version=python.version,
    )


def trainer_environment(config: Config, facts: HostFacts, code: Code) -> EnvironmentSpec:
    """Return the environment that the trainer of this config has on this host."""
    assert code.constraints is not None, "a plan without problems"
    return _environment("trainer", config, facts, list(code.requirements), constraints=code.constraints, no_deps=[])


def _environments(config: Config, facts: HostFacts, code: Code) -> list[EnvironmentSpec]:
    """Return the trainer's environment, and the engine's if it has a lock."""
    assert code.engine_requirements is not None, "a plan without problems"
    trainer = trainer_environment(config, facts, code)
    requirements, no_deps = read_lock(code.engine_requirements)
    if not requirements and not no_deps:
        return [trainer]
    return [trainer, _environment("engine", config, facts, requirements, constraints="", no_deps=no_deps)]


def launch_plan(
    config: Config, facts: HostFacts, code: Code, run_id: str, *, group: HostGroup | None = None
) -> LaunchPlan:
    """Decide environments, command lines and time limits of the run; of one host's part, in a `group` of several."""
    assert facts.python is not None
    path = str(run_path(facts.home, run_id))
    leads = group is None or group.leads
    environments = _environments(config, facts, code)[: None if leads else 1]
    pythons = [f"{environment.path}/bin/python" for environment in environments]
    return LaunchPlan(
        run_id=run_id,
        experiment_name=config.output.experiment_name,
        home=facts.home,
        run_path=path,
        base_python=facts.python,
        environments=environments,
        stages=[
            _stage(config, facts, code, stage, path, python=pythons[0], engine_python=pythons[-1], group=group)
            for stage in config.stages
        ],
        bootstrap_timeout_s=config.limits.bootstrap_timeout_s,
        stop_grace_s=config.limits.stop_grace_s,
        engine_restarts_max=config.engine.restarts_max if config.engine else 0,
        engine_hang_timeout_s=config.limits.engine_hang_timeout_s,
        models=_hub_models(config, code),
        smoke=_smoke(config, facts, code, RunDir(Path(path)), environments, engines=leads),
        package_path=_package_path(code, RunDir(Path(path))),
        group=group,
        network=_network_check(config, facts, code, RunDir(Path(path)), group=group, python=pythons[0])
        if group
        else None,
    )


def _package_path(code: Code, run: RunDir) -> str:
    return str(run.code_package) if code.package is not None else ""


def _smoke(
    config: Config, facts: HostFacts, code: Code, run: RunDir, environments: list[EnvironmentSpec], *, engines: bool
) -> list[SmokeCheck]:
    """Try each environment that a stage uses, on the devices that it gets there; `engines`: they run on this host."""
    if config.target.device_type == "mps":  # no Linux: nothing runs there
        return []
    trainer, python = environments[0], f"{environments[0].path}/bin/python"
    several = len(config.target.gpu_ranks) > 1
    start = _torchrun(config, run, SMOKE_STAGE, python, None) if several else (python,)
    env = _process_env(config, facts, code, run, config.target.gpu_ranks)
    samples = config.engine is not None and config.uses_engine and engines
    has_engine = samples and len(environments) == 1
    checks = [trainer_check(config, facts, run, trainer, start=start, env=env, has_engine=has_engine)]
    if config.engine is not None and samples and len(environments) > 1:
        devices = sorted(set(config.engine.gpu_ranks))
        checks.append(
            engine_check(config, facts, run, environments[1], env=_engine_env(config, facts, code, run, devices))
        )
    return checks


def _hub_models(config: Config, code: Code) -> list[HubModel]:
    """List what the hub is asked for: names that are not paths, of the model and of a KL reference that is used."""
    rl = config.rl if "rl" in config.stages else None
    weights = config.model.init == "pretrained" and config.output.source_checkpoint is None
    named = {config.model.name: weights}
    if rl is not None and rl.kl is not None and rl.kl.reference is not None:
        named[rl.kl.reference] = True
    return [HubModel(name=name, weights=whole) for name, whole in named.items() if code.named.get(name) == "missing"]


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
    """Return a stage of this host: ranks of the trainer on each host, engines and checkpoints on the first alone."""
    run = RunDir(Path(path))
    after_sft, leads = stage == "rl" and "sft" in config.stages, group is None or group.leads
    torchrun = _torchrun(config, run, stage, python, group)
    samples = stage == "rl" and config.uses_engine and leads
    engine = config.engine if samples else None
    replicas = range(engine.replicas) if engine else ()
    engines = [
        _engine(config, facts, code, run, python=engine_python, replica=replica, after_sft=after_sft)
        for replica in replicas
    ]
    urls = [part for replica in replicas if engine for part in ("--engine-url", engine_url(engine, replica))]
    if engine is not None and (router := router_url(engine)) is not None:
        engines.append(_router(config, facts, code, run, python=engine_python))
        urls += ["--router-url", router]
    trainer = ProcessSpec(
        window="trainer",
        argv=[*torchrun, "-m", "rollouts.worker.trainer", "--run-dir", path, "--stage", stage, *urls],
        env=_process_env(config, facts, code, run, config.target.gpu_ranks, group=group),
        ready_url=None,
        ready_timeout_s=0.0,
    )
    return StageSpec(
        name=stage,  # type: ignore[arg-type]
        engines=engines,
        trainer=trainer,
        timeout_s=config.limits.stage_timeout_s,
        needs_checkpoint=str(run.latest_checkpoint("sft")) if after_sft and leads else None,
    )


def _torchrun(config: Config, run: RunDir, stage: str, python: str, group: HostGroup | None) -> tuple[str, ...]:
    """Start ranks that find each other through files of the run directory; on several hosts through a store that
    listens at the private address of the first alone.

    torchrun's own store (`--standalone`) listens on every address, and unpickles whatever is written into it.
    """
    ranks = str(len(config.target.gpu_ranks))
    if group is not None:
        return (
            *(python, "-m", "rollouts.training.bound_torchrun", "--rdzv-backend", "static", "--rdzv-id", run.run_id),
            *("--master-addr", group.leader.address, "--master-port", str(group.trainer_port)),
            *("--nnodes", str(len(group.hosts)), "--node-rank", str(group.rank), "--nproc-per-node", ranks),
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
    env = _process_env(config, facts, code, run, config.target.gpu_ranks, group=group)
    process = ProcessSpec(window="network", argv=argv, env=env, ready_url=None, ready_timeout_s=0.0)
    names = ", ".join(f"{host.name} at {host.address}" for host in group.hosts)
    timeout_s = min(NETWORK_TIMEOUT_S, config.limits.bootstrap_timeout_s)
    return SmokeCheck(process=process, timeout_s=timeout_s, marker="", subject=f"the network between {names}")


def _engine(
    config: Config, facts: HostFacts, code: Code, run: RunDir, *, python: str, replica: int, after_sft: bool
) -> ProcessSpec:
    engine, device_type = config.engine, config.target.device_type
    assert engine is not None and config.rl is not None
    argv = engine_argv(
        engine,
        config.model,
        python=python,
        model_path=_start_model(config, code, run, after_sft=after_sft),
        device_type=device_type,
        seed=config.rl.sampling.seed,
        replica=replica,
    )
    return ProcessSpec(
        window=f"engine-{replica}",
        argv=list(argv),
        env=_engine_env(config, facts, code, run, engine_devices(engine, replica)),
        ready_url=ready_url(engine, replica),
        ready_timeout_s=config.limits.engine_ready_timeout_s,
        tools_of=posixpath.dirname(posixpath.dirname(python)),
    )


def _engine_env(config: Config, facts: HostFacts, code: Code, run: RunDir, devices: list[int]) -> dict[str, str]:
    engine = config.engine
    assert engine is not None
    program = _package_path(code, run) or str(run.code_tree)
    own = engine_env(engine, device_type=config.target.device_type, tree=program)
    by_index = engine.kind != "embedded"  # SGLang's all-reduce and vLLM read the variable as integers
    env = {**own, **_process_env(config, facts, code, run, devices, by_index=by_index)}
    if PYTHONPATH in own:
        shared = _search_path(config, code, run).get(PYTHONPATH, "")
        env[PYTHONPATH] = ":".join(filter(None, (own[PYTHONPATH], shared)))
    return env


def _router(config: Config, facts: HostFacts, code: Code, run: RunDir, *, python: str) -> ProcessSpec:
    """Return the router's process. It is started and watched like the engines, and is ready once they are."""
    engine = config.engine
    assert engine is not None
    return ProcessSpec(
        window="router",
        argv=list(router_argv(engine, python=python, request_timeout_s=config.limits.sample_timeout_s)),
        env=_process_env(config, facts, code, run, []),
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
    return posixpath.join(str(run.code_tree), posixpath.normpath(name)) if code.named.get(name) == "sent" else name


def _process_env(
    config: Config,
    facts: HostFacts,
    code: Code,
    run: RunDir,
    ranks: list[int],
    *,
    by_index: bool = False,
    group: HostGroup | None = None,
) -> dict[str, str]:
    interface = {} if group is None else group_env(group.hosts[group.rank].interface)
    return {
        "OMP_NUM_THREADS": str(config.host.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        **LOOPBACK_ONLY,
        **interface,
        **(_devices(facts, ranks, by_index=by_index) if config.target.device_type == "cuda" else {}),
        **config.host.env,
        **_search_path(config, code, run),
    }


def _search_path(config: Config, code: Code, run: RunDir) -> dict[str, str]:
    """Return the variables by which a process in code/tree finds our modules: in a clone host.env's alone.

    PYTHONSAFEPATH keeps Python from looking into code/tree first: the trainer adds it last (`find_user_code`).
    """
    wanted = config.host.env.get(PYTHONPATH, "")
    if package := _package_path(code, run):
        return {PYTHONPATH: ":".join(filter(None, (package, wanted))), "PYTHONSAFEPATH": "1"}
    return {PYTHONPATH: wanted} if wanted else {}


def _devices(facts: HostFacts, ranks: list[int], *, by_index: bool) -> dict[str, str]:
    """Name cards so that CUDA takes those that nvidia-smi showed: CUDA's own order is the fastest first.

    By UUID where all of them have one, else (and with `by_index`) by number in the order of the PCI bus. GPUS_VARIABLE
    has the numbers in both cases: by them one run's cards are told from another's.
    """
    uuids = {gpu.index: gpu.uuid for gpu in facts.gpus if gpu.uuid.startswith("GPU-")}
    numbers = ",".join(map(str, ranks))
    named = not by_index and all(rank in uuids for rank in ranks)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(uuids[rank] for rank in ranks) if named else numbers,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        GPUS_VARIABLE: numbers,
    }
