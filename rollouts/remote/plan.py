"""What a deploy would do, decided. Pure: config + facts + code → Plan. No clock, network or disk.

`--plan` prints the value made here; execute.py does it and decides nothing. A plan with problems is never executed.
"""

import hashlib
import json
import os
import posixpath
import shlex
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base_config import Config, EngineConfig
from rollouts.engines.launch import (
    LOOPBACK_ONLY,
    engine_argv,
    engine_devices,
    engine_env,
    engine_url,
    ready_url,
    router_argv,
    router_ready_url,
    router_url,
)
from rollouts.remote.errors import Problem
from rollouts.remote.facts import PYTHON_MIN, Gpu, HostFacts
from rollouts.remote.repository import Code, named_paths
from rollouts.run_dir import EnvironmentSpec, LaunchPlan, ProcessSpec, RunDir, StageSpec, run_path, valid_run_id

GIB = 2**30
GPU_FREE_SHARE_MIN = 0.9  # a device with less free memory is someone's
INSTALL_HINTS = {
    "tmux": "on the host: apt-get install tmux",
    "rsync": "on the host: apt-get install rsync",
    "uv": "on the host: curl -LsSf https://astral.sh/uv/install.sh | sh; or set host.installer='pip'",
}


@dataclass(frozen=True)
class Step:
    """One thing that would be done, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    target: str
    run_id: str
    local_dir: str  # the mirror here
    problems: tuple[Problem, ...]  # every reason why it cannot be executed
    notes: tuple[str, ...]
    steps: tuple[Step, ...]
    launch: LaunchPlan | None  # None where the host lacks what the plan rests on (a Python)

    def to_json(self) -> dict[str, Any]:
        return {"type": "plan", **asdict(self)}


def asked_ports(config: Config) -> list[int]:
    """Ports that must be free on the host."""
    engine = config.engine
    if engine is None or not config.uses_engine:
        return []
    router = [] if engine.router_port is None else [engine.router_port]
    return [*range(engine.sglang_port, engine.sglang_port + engine.replicas), *router]


def asked_paths(config: Config) -> list[str]:
    """Absolute paths that must exist on the host."""
    names = [*named_paths(config), config.output.source_checkpoint or ""]
    return [name for name in dict.fromkeys(names) if os.path.isabs(name)]


def make_plan(
    config: Config,
    facts: HostFacts,
    code: Code,
    *,
    target: str,
    run_id: str,
    local_dir: str,
    secrets_set: Collection[str],
) -> Plan:
    """Decide everything. `secrets_set`: those of host.secrets that have a value here."""
    problems = (
        *_run_problems(config, facts, target, run_id),
        *_tool_problems(config, facts, target),
        *_gpu_problems(config, facts, target),
        *_room_problems(config, facts, target),
        *_path_problems(config, facts, code, target),
        *_lock_problems(config, code),
        *_secret_problems(config, secrets_set),
    )
    locks = code.constraints is not None and code.engine_requirements is not None
    launch = _launch_plan(config, facts, code, run_id) if facts.python and locks else None
    return Plan(
        target=target,
        run_id=run_id,
        local_dir=local_dir,
        problems=problems,
        notes=tuple(_notes(config, facts, code)),
        steps=(*_steps(config, facts, code, launch, target), _watch_step(local_dir)) if launch else (),
        launch=launch,
    )


# --- problems -------------------------------------------------------------------------------------------------------


def _run_problems(config: Config, facts: HostFacts, target: str, run_id: str) -> Iterator[Problem]:
    if not valid_run_id(run_id):
        yield Problem(
            f"--run-id {run_id!r} cannot name a run.", needed="1 to 80 letters, digits, '-' or '_', no '-' or '_' first"
        )
    if facts.run_exists:
        found = facts.run(run_id)
        yield Problem(
            f"the run id {run_id!r} is in use on {target}.",
            found=f"{run_path(facts.home, run_id)}" + (f", {found['state']}" if found else ""),
            fix=f"choose another --run-id, or leave it out; `deploy attach {run_id}` goes on with that run",
        )
    name = config.output.experiment_name
    for row in facts.runs:
        if row["live"] and row["experiment_name"] == name and row["run_id"] != run_id:
            yield Problem(
                f"a run of experiment {name!r} is live on {target}.",
                found=f"{row['run_id']}, {row['state']}, stage {row['stage']}, step {row['step']}",
                fix=f"wait for it, `deploy stop {row['run_id']}`, or set another output.experiment_name",
            )


def _tool_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    uv = ("uv",) if config.host.installer == "uv" else ()
    for tool in ("tmux", "rsync", *uv):
        if tool not in facts.tools:
            why = {
                "tmux": "every process of a run gets a window of one tmux session",
                "rsync": "the code goes there and the results come back with it",
                "uv": "host.installer='uv' builds the environments with it",
            }[tool]
            yield Problem(f"{target} has no {tool}.", found=f"PATH={facts.path}", needed=why, fix=INSTALL_HINTS[tool])
    least = ".".join(map(str, PYTHON_MIN))
    if facts.python is None:
        yield Problem(
            f"{target} has no Python {least} or newer.",
            found=", ".join(facts.pythons_seen) or f"no python3 in PATH={facts.path}",
            needed=f"python3 >= {least}, for the supervisor and the environments",
            fix="on the host: apt-get install python3 python3-venv, or `uv python install` and link it into PATH",
        )
    elif config.host.installer == "pip" and not facts.has_venv:
        yield Problem(
            f"{target}: its Python cannot make virtual environments.",
            found=f"{facts.python} {facts.python_version} without venv and ensurepip",
            fix="on the host: apt-get install python3-venv; or set host.installer='uv'",
        )


def _gpu_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    if config.target.device_type != "cuda":
        return
    ranks = _device_ranks(config)
    by_index = {gpu.index: gpu for gpu in facts.gpus}
    wanted = [f"target.gpu_ranks={config.target.gpu_ranks}"]
    if config.engine and config.uses_engine:
        wanted.append(f"engine.gpu_ranks={config.engine.gpu_ranks}")
    missing = [rank for rank in ranks if rank not in by_index]
    if missing:
        count = len(facts.gpus)
        listed = "\n".join(describe_gpu(gpu) for gpu in facts.gpus)
        reachable = [rank for rank in ranks if rank in by_index]
        yield Problem(
            f"{target} has {count} GPU{'' if count == 1 else 's'}; this config needs {len(ranks)}"
            f"{'' if not reachable else f', {missing} are not there'}.",
            found=listed or facts.gpu_problem or "no nvidia-smi, or it lists no device",
            needed=", ".join(wanted),
            fix=_gpu_fix(config, facts),
        )
    for rank in ranks:
        gpu = by_index.get(rank)
        if gpu is None:
            continue
        holders = [process for process in facts.gpu_processes if process.gpu_uuid == gpu.uuid]
        if holders or gpu.memory_free_mib < GPU_FREE_SHARE_MIN * gpu.memory_total_mib:
            who = "\n".join(
                f"pid {p.pid} {p.name}" + (f", {p.memory_mib} MiB" if p.memory_mib is not None else "") for p in holders
            )
            free = [other.index for other in facts.gpus if _is_free(other, facts)]
            yield Problem(
                f"{target}: GPU {rank} is busy.",
                found="\n".join(filter(None, (describe_gpu(gpu), who))),
                needed=", ".join(wanted),
                fix=f"free are {free}: name those, or end what runs there" if free else "end what runs there, or wait",
            )


def _gpu_fix(config: Config, facts: HostFacts) -> str:
    if not facts.gpus:
        return "choose another --remote, or set target.device_type='cpu'"
    first = facts.gpus[0].index
    if config.engine and config.uses_engine and len(config.target.gpu_ranks) == 1:
        return f"set engine.gpu_ranks=[{first}] and target.gpu_ranks=[{first}] (colocated), or choose another --remote"
    return "name fewer devices in target.gpu_ranks, or choose another --remote"


def _is_free(gpu: Gpu, facts: HostFacts) -> bool:
    held = any(process.gpu_uuid == gpu.uuid for process in facts.gpu_processes)
    return not held and gpu.memory_free_mib >= GPU_FREE_SHARE_MIN * gpu.memory_total_mib


def describe_gpu(gpu: Gpu) -> str:
    return f"{gpu.index}: {gpu.name}, {gpu.memory_free_mib / 1024:.0f} of {gpu.memory_total_mib / 1024:.0f} GiB free"


def _device_ranks(config: Config) -> list[int]:
    engine = config.engine.gpu_ranks if config.engine and config.uses_engine else []
    return sorted({*config.target.gpu_ranks, *engine})


def _room_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    free_gib = facts.disk_free_bytes / GIB
    if facts.python and free_gib < config.host.disk_free_gib_min:
        yield Problem(
            f"{target} has {free_gib:.1f} GiB of disk left.",
            found=f"{free_gib:.1f} GiB free at {facts.home}",
            needed=f"host.disk_free_gib_min={config.host.disk_free_gib_min}",
            fix="free some space there, set ROLLOUTS_HOME on the host to a larger disk, or lower the minimum",
        )
    for port in facts.ports_in_use:
        routes = config.engine is not None and port == config.engine.router_port
        field = "router_port" if routes else "sglang_port"
        yield Problem(
            f"{target}: port {port} is in use.",
            found=f"something listens on {port} there",
            needed=f"engine.router_port={port}, for the router" if routes else _ports_wanted(config),
            fix=f"set another engine.{field}, or end what listens there",
        )


def _ports_wanted(config: Config) -> str:
    assert config.engine is not None, "no engine, no port"
    port, replicas = config.engine.sglang_port, config.engine.replicas
    which = f", the first of engine.replicas={replicas}" if replicas > 1 else ""
    return f"engine.sglang_port={port}{which}, for the inference server"


def _path_problems(config: Config, facts: HostFacts, code: Code, target: str) -> Iterator[Problem]:
    if code.constraints is None:
        yield Problem(
            f"host.constraints_file={config.host.constraints_file!r} is not in {code.root}.",
            fix="correct the path, or set None to install unconstrained",
        )
    for name, locality in code.named.items():
        if locality == "not sent":
            yield Problem(
                f"{name!r} is here, but git ignores it, so it would not reach the host.",
                needed="a path that git lists, an absolute path on the host, or a hub id",
                fix=f"remove it from .gitignore, or copy it to the host and name it there: /…/{Path(name).name}",
            )
        elif locality == "missing" and _looks_like_path(name):
            yield Problem(
                f"{name!r} does not exist in {code.root}.",
                needed="a path relative to the repository, an absolute path on the host, or a hub id",
                fix="check the spelling",
            )
    for path in asked_paths(config) if facts.python else ():
        if path not in facts.paths:
            field = "output.source_checkpoint" if path == config.output.source_checkpoint else "model or data"
            yield Problem(
                f"{path!r} does not exist on {target} ({field}).",
                fix="check the spelling; checkpoints of earlier runs there are "
                f"{facts.home}/runs/<run>/checkpoints/<stage>/latest",
            )
    source = config.output.source_checkpoint
    if source is not None and not os.path.isabs(source):
        yield Problem(
            f"output.source_checkpoint={source!r} is not absolute.",
            needed="a directory on the host",
            fix=f"for example {facts.home}/runs/<run>/checkpoints/sft/latest",
        )


def _lock_problems(config: Config, code: Code) -> Iterator[Problem]:
    """Is the engine's lock there, and one that installs that engine? Else it is known after gigabytes of packages."""
    engine = config.engine
    if engine is None or not config.uses_engine or engine.requirements_file is None:
        return
    field = f"engine.requirements_file={engine.requirements_file!r}"
    if code.engine_requirements is None:
        fix = "correct the path; the locks that come with this repository are in requirements/"
        yield Problem(f"{field} is not in {code.root}.", fix=fix)
        return
    requirements = [line for lines in read_lock(code.engine_requirements) for line in lines]
    if not requirements:
        yield Problem(
            f"{field} lists no package.",
            needed="a lock of the engine's whole environment",
            fix="name another; with engine.kind='embedded' None runs it in the trainer's environment",
        )
    elif engine.kind != "embedded" and not any(engine.kind in line.lower() for line in requirements):
        yield Problem(
            f"{field} does not install {engine.kind}.",
            found=f"{len(requirements)} requirements, none of which names it",
            needed=f"a lock that has engine.kind={engine.kind!r}",
            fix=f"name a lock of {engine.kind}; the locks that come with this repository are in requirements/",
        )


def _looks_like_path(name: str) -> bool:
    """Not a hub id, which is `name` or `owner/name`."""
    return name.startswith(".") or name.endswith((".jsonl", "/")) or name.count("/") > 1


def _secret_problems(config: Config, secrets_set: Collection[str]) -> Iterator[Problem]:
    for name in config.host.secrets:
        if name not in secrets_set:
            yield Problem(
                f"the secret {name} is not set here.",
                needed=f"host.secrets={config.host.secrets}: read from this environment at deploy time",
                fix=f"export {name}=…, or take it out of host.secrets",
            )


# --- the launch plan ------------------------------------------------------------------------------------------------


def environment_key(
    requirements: Collection[str],
    constraints: str,
    installer: str,
    python_version: str,
    platform: str,
    *,
    no_deps: Collection[str] = (),
) -> str:
    """Names an environment by what it holds: equal inputs, equal environment."""
    parts = [sorted(requirements), constraints, installer, python_version, platform]
    if no_deps:
        parts.append(sorted(no_deps))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_lock(text: str) -> tuple[list[str], list[str]]:
    """(requirements, those marked `# no-deps`) of a requirements file; comments and empty lines left out."""
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
    assert facts.python is not None
    installer = config.host.installer
    key = environment_key(requirements, constraints, installer, facts.python_version, facts.platform, no_deps=no_deps)
    return EnvironmentSpec(
        name=name,
        path=f"{facts.home}/envs/{key}",
        installer=installer,
        base_python=facts.python,
        requirements=requirements,
        requirements_no_deps=no_deps,
        constraints=constraints,
    )


def _environments(config: Config, facts: HostFacts, code: Code) -> list[EnvironmentSpec]:
    """The trainer's, and the engine's own where it has a lock."""
    assert code.constraints is not None and code.engine_requirements is not None
    trainer = _environment("trainer", config, facts, list(code.requirements), constraints=code.constraints, no_deps=[])
    requirements, no_deps = read_lock(code.engine_requirements)
    if not requirements and not no_deps:
        return [trainer]
    return [trainer, _environment("engine", config, facts, requirements, constraints="", no_deps=no_deps)]


def _launch_plan(config: Config, facts: HostFacts, code: Code, run_id: str) -> LaunchPlan:
    assert facts.python is not None
    path = str(run_path(facts.home, run_id))
    environments = _environments(config, facts, code)
    pythons = [f"{environment.path}/bin/python" for environment in environments]
    return LaunchPlan(
        run_id=run_id,
        experiment_name=config.output.experiment_name,
        home=facts.home,
        run_path=path,
        base_python=facts.python,
        environments=environments,
        stages=[
            _stage(config, code, stage, path, python=pythons[0], engine_python=pythons[-1]) for stage in config.stages
        ],
        bootstrap_timeout_s=config.limits.bootstrap_timeout_s,
        stop_grace_s=config.limits.stop_grace_s,
        engine_restarts_max=config.engine.restarts_max if config.engine else 0,
        engine_hang_timeout_s=config.limits.engine_hang_timeout_s,
    )


def _stage(config: Config, code: Code, stage: str, path: str, *, python: str, engine_python: str) -> StageSpec:
    run = RunDir(Path(path))
    after_sft = stage == "rl" and "sft" in config.stages
    torchrun = _torchrun(config, run, stage, python)
    samples = stage == "rl" and config.uses_engine
    engine = config.engine if samples else None
    replicas = range(engine.replicas) if engine else ()
    engines = [_engine(config, code, run, engine_python, replica, after_sft=after_sft) for replica in replicas]
    urls = [part for replica in replicas if engine for part in ("--engine-url", engine_url(engine, replica))]
    if engine is not None and (router := router_url(engine)) is not None:
        engines.append(_router(config, engine, engine_python))
        urls += ["--router-url", router]
    trainer = ProcessSpec(
        window="trainer",
        argv=[*torchrun, "-m", "rollouts.worker.trainer", "--run-dir", path, "--stage", stage, *urls],
        env=_process_env(config, config.target.gpu_ranks),
        ready_url=None,
        ready_timeout_s=0.0,
    )
    return StageSpec(
        name=stage,  # type: ignore[arg-type]
        engines=engines,
        trainer=trainer,
        timeout_s=config.limits.stage_timeout_s,
        needs_checkpoint=str(run.latest_checkpoint("sft")) if after_sft else None,
    )


def _torchrun(config: Config, run: RunDir, stage: str, python: str) -> tuple[str, ...]:
    """Ranks that find each other through files of the run directory.

    torchrun's own store (`--standalone`) listens on every address, and unpickles what anybody writes into it.
    """
    return (
        *(python, "-m", "torch.distributed.run"),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-id", run.run_id),
        *("--rdzv-endpoint", str(run.rendezvous(stage)), "--local-addr", "127.0.0.1"),
        *("--nnodes", "1", "--nproc-per-node", str(_world_size(config))),
    )


def _engine(config: Config, code: Code, run: RunDir, python: str, replica: int, *, after_sft: bool) -> ProcessSpec:
    engine, device_type = config.engine, config.target.device_type
    assert engine is not None and config.rl is not None
    argv = engine_argv(
        engine,
        config.model,
        python=python,
        model_path=_start_model(config, code, run, after_sft=after_sft),
        device_type=device_type,
        seed=config.rl.seed,
        replica=replica,
    )
    own = engine_env(engine, device_type=device_type, tree=str(run.code_tree))
    env = {**own, **_process_env(config, engine_devices(engine, replica))}
    if "PYTHONPATH" in own and "PYTHONPATH" in config.host.env:
        env["PYTHONPATH"] = f"{own['PYTHONPATH']}:{config.host.env['PYTHONPATH']}"
    return ProcessSpec(
        window=f"engine-{replica}",
        argv=list(argv),
        env=env,
        ready_url=ready_url(engine, replica),
        ready_timeout_s=config.limits.engine_ready_timeout_s,
    )


def _router(config: Config, engine: EngineConfig, python: str) -> ProcessSpec:
    """Started and watched like the engines that it stands in front of; it is ready once they are."""
    return ProcessSpec(
        window="router",
        argv=list(router_argv(engine, python=python, request_timeout_s=config.limits.sample_timeout_s)),
        env=_process_env(config, []),
        ready_url=router_ready_url(engine),
        ready_timeout_s=config.limits.engine_ready_timeout_s,
    )


def _start_model(config: Config, code: Code, run: RunDir, *, after_sft: bool) -> str:
    """What the engine of the RL stage serves first: the policy that RL starts from."""
    if after_sft:
        return str(run.latest_checkpoint("sft"))
    if config.output.source_checkpoint:
        return config.output.source_checkpoint
    name = config.model.name
    return posixpath.join(str(run.code_tree), posixpath.normpath(name)) if code.named.get(name) == "sent" else name


def _world_size(config: Config) -> int:
    return len(config.target.gpu_ranks)


def _process_env(config: Config, ranks: list[int]) -> dict[str, str]:
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, ranks))} if config.target.device_type == "cuda" else {}
    return {
        "OMP_NUM_THREADS": str(config.host.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        **LOOPBACK_ONLY,
        **devices,
        **config.host.env,
    }


# --- in words -------------------------------------------------------------------------------------------------------


def _notes(config: Config, facts: HostFacts, code: Code) -> Iterator[str]:
    if not code.commit:
        yield "the repository has no commit yet: the code is sent, but no commit can be recorded"
    if config.target.device_type == "cuda" and facts.driver:
        yield f"NVIDIA driver {facts.driver}"
    if config.host.env:
        yield f"host.env sets {', '.join(config.host.env)}"
    if config.host.secrets:
        yield f"{', '.join(config.host.secrets)}: sent over stdin, kept in a 0600 file on the host until the run ends"


def _steps(config: Config, facts: HostFacts, code: Code, launch: LaunchPlan, target: str) -> Iterator[Step]:
    commit = code.commit[:10] or "no commit"
    yield Step(
        f"sync {len(code.files)} files, {code.size_bytes / 1e6:.1f} MB, to {target}:{launch.run_path}/code/tree",
        f"git's files at {commit}" + (f" with {code.changed} uncommitted changes" if code.changed else ", unchanged"),
    )
    for environment in launch.environments:
        complete = posixpath.basename(environment.path) in facts.environments
        count = len(environment.requirements) + len(environment.requirements_no_deps)
        if environment.name == "engine" and config.engine:
            content = f"{count} requirements of {config.engine.requirements_file}"
        else:
            content = f"{count} requirements, constraints {config.host.constraints_file or 'none'}"
        yield Step(
            f"{'reuse' if complete else 'build'} the {environment.name} environment {environment.path}"
            f"{'' if complete else f' with {environment.installer}'}",
            f"{content}, Python {facts.python_version}: "
            f"{'complete there' if complete else 'none of this content there yet'}",
        )
    yield Step(
        f"start tmux session {launch.run_id} with a window per process",
        "the run goes on when this machine is switched off",
    )
    for stage in launch.stages:
        for engine in stage.engines:
            yield Step(f"{stage.name}: {engine.window}: {shlex.join(engine.argv)}", _placed(config, engine, facts))
        yield Step(f"{stage.name}: trainer: {shlex.join(stage.trainer.argv)}", _placed(config, stage.trainer, facts))


def _watch_step(local_dir: str) -> Step:
    why = "metrics as they grow, each completed checkpoint, verified"
    return Step(f"watch, and pull results into {local_dir}", why)


def _placed(config: Config, process: ProcessSpec, facts: HostFacts) -> str:
    devices = process.env.get("CUDA_VISIBLE_DEVICES")
    where = f"GPU {devices}" if devices else "no GPU" if devices == "" else config.target.device_type
    ready = f", ready when {process.ready_url} answers, within {process.ready_timeout_s:.0f} s"
    return f"on {where} of {facts.host}{ready if process.ready_url else ''}"
