"""The smoke tests of a run: what is tried on the host before the first stage, in which environment. Pure."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from rollouts.config import Config
from rollouts.engines.command_lines import engine_modules
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.torch_build import TorchBuild, build_words, engine_build, trainer_build
from rollouts.run_dir import EnvironmentSpec, ProcessSpec, RunDir, SmokeCheck

CHECKS = 1  # raised when the checks change, so that hosts that passed the old ones are tried again
TIMEOUT_S = 300.0  # seconds are usual; a first import from a slow disk, and CUDA's first start, take a minute or two
COMPILING = ("sglang", "vllm")  # engines that compile kernels on CUDA
# Variables that decide which devices and libraries a process meets; of the others none acts on what is tried
ACTING = ("CUDA_", "NVIDIA_", "NCCL_", "LD_", "PYTORCH_", "TORCH_", "PATH", "PYTHONPATH")


def trainer_check(
    config: Config,
    facts: HostFacts,
    run: RunDir,
    environment: EnvironmentSpec,
    *,
    start: Sequence[str],
    env: Mapping[str, str],
    has_engine: bool,
) -> SmokeCheck:
    """Try the trainer's environment on its ranks' devices. `start` runs a module on each rank; `has_engine`: the engine
    runs in this environment too."""
    modules: tuple[str, ...] = ()
    if config.engine is not None and has_engine:
        modules = engine_modules(config.engine, device_type=config.target.device_type)
    argv = [
        *(
            *start,
            "-m",
            "rollouts.training.smoke",
            "trainer",
            "--device",
            config.target.device_type,
        ),
        *("--store", str(run.ranks("bootstrap")), "--report", str(run.smoke_report("smoke"))),
        *(part for module in modules for part in ("--module", module)),
        *(("--compilers", "c++", "Python.h") if config.model.compile else ()),
    ]
    process = _process("smoke", argv, env)
    build, ranks, tried = (
        trainer_build(config, facts),
        config.target.gpu_ranks,
        [modules, config.model.compile],
    )
    return _check(config, facts, run, environment, process, build=build, ranks=ranks, tried=tried)


def engine_check(
    config: Config,
    facts: HostFacts,
    run: RunDir,
    environment: EnvironmentSpec,
    *,
    env: Mapping[str, str],
) -> SmokeCheck:
    """Try an engine's own environment, on the devices of all replicas."""
    engine, device_type = config.engine, config.target.device_type
    assert engine is not None
    modules = engine_modules(engine, device_type=device_type)
    compiles = device_type == "cuda" and engine.kind in COMPILING
    ranks = sorted(set(engine.gpu_ranks)) if device_type == "cuda" else []
    cards = (
        engine.tensor_parallel_size
        if "CUDA_VISIBLE_DEVICES" in config.host.env
        else len(ranks) or 1
    )
    argv = [
        *(
            f"{environment.path}/bin/python",
            "-m",
            "rollouts.training.smoke",
            "engine",
            "--device",
            device_type,
        ),
        *("--cards", str(cards), "--report", str(run.smoke_report("smoke-engine"))),
        *(part for module in modules for part in ("--module", module)),
        *(("--compilers", "ninja", "nvcc", "c++", "Python.h") if compiles else ()),
    ]
    process = _process("smoke-engine", argv, env, tools_of=environment.path)
    build, tried = engine_build(config, facts), [modules, compiles]
    return _check(config, facts, run, environment, process, build=build, ranks=ranks, tried=tried)


def _process(
    window: str, argv: Sequence[str], env: Mapping[str, str], *, tools_of: str = ""
) -> ProcessSpec:
    return ProcessSpec(
        window=window,
        argv=list(argv),
        env=dict(env),
        ready_url=None,
        ready_timeout_s=0.0,
        tools_of=tools_of,
    )


def _check(
    config: Config,
    facts: HostFacts,
    run: RunDir,
    environment: EnvironmentSpec,
    process: ProcessSpec,
    *,
    build: TorchBuild,
    ranks: Sequence[int],
    tried: Sequence[object],
) -> SmokeCheck:
    """Return the check. `tried`: what else tells one check from another."""
    on_cuda = config.target.device_type == "cuda"
    cards = [gpu for gpu in facts.gpus if gpu.index in ranks] if on_cuda else []
    acting = sorted(
        (name, value.replace(str(run.path), ""))
        for name, value in process.env.items()
        if name.startswith(ACTING)
    )
    devices = [[gpu.index, gpu.uuid, gpu.name] for gpu in cards]
    known = [
        CHECKS,
        config.target.device_type,
        len(ranks),
        devices,
        facts.driver if on_cuda else None,
        acting,
        *tried,
    ]
    named = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in cards) or config.target.device_type
    driver = f", NVIDIA driver {facts.driver or 'unknown'}" if on_cuda else ""
    return SmokeCheck(
        process=process,
        timeout_s=min(TIMEOUT_S, config.limits.bootstrap_timeout_s),
        marker=f"{environment.path}/.smoke-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}",
        subject=f"{named}{driver}, {build_words(build)}",
    )
