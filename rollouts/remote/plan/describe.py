"""The plan in words: its steps, each with the reason, and its notes. Pure."""

import posixpath
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from rollouts.config import Config
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.torch_build import base_python, build_words, engine_build, trainer_build
from rollouts.remote.repository import Code
from rollouts.run_dir import GPUS_VARIABLE, EnvironmentSpec, LaunchPlan, ProcessSpec


@dataclass(frozen=True)
class PlanStep:
    """One thing that would be done, and why."""

    what: str
    why: str


def plan_notes(config: Config, facts: HostFacts, code: Code) -> Iterator[str]:
    yield from facts.way_notes
    yield from code.notes
    yield from code.inputs.notes
    if code.untracked:
        shown = ", ".join(code.untracked[:3]) + (", …" if len(code.untracked) > 3 else "")
        yield (
            f"{len(code.untracked)} files that git does not track are sent too, {code.untracked_bytes / 1e6:.1f} MB"
            f" ({shown}): code/manifest.json has their digests, code/dirty.diff not their text"
        )
    if config.target.device_type == "cuda" and facts.driver:
        yield f"NVIDIA driver {facts.driver}"
    if "uv" not in facts.tools and (config.host.installer == "uv" or _makes_python(config, facts)):
        yield "the host has no uv: the package index's is put into the rollouts home there"
    if config.host.env:
        yield f"host.env sets {', '.join(config.host.env)}"
    if config.host.secrets:
        yield f"{', '.join(config.host.secrets)}: sent over stdin, kept in a 0600 file on the host until the run ends"


def _makes_python(config: Config, facts: HostFacts) -> bool:
    """Return whether a Python has to be installed for an environment of the run."""
    has_lock = (
        config.engine is not None
        and config.uses_engine
        and config.engine.requirements_file is not None
    )
    kinds = (False, True) if has_lock else (False,)
    return facts.python is not None and any(
        not base_python(config, facts, engine=kind).path for kind in kinds
    )


def plan_steps(
    config: Config, facts: HostFacts, code: Code, launch: LaunchPlan, target: str
) -> Iterator[PlanStep]:
    commit = code.commit[:10] or "no commit"
    yield PlanStep(
        f"sync {len(code.files)} files, {code.size_bytes / 1e6:.1f} MB, to {target}:{launch.run_path}/code/tree",
        f"git's files at {commit}"
        + (f" with {code.changed} uncommitted changes" if code.changed else ", unchanged"),
    )
    if code.package is not None:
        what = f"{len(code.package.files)} files of rollouts {code.package.version}"
        yield PlanStep(
            f"sync {what} to {target}:{launch.package_path}",
            "the package that this command is part of runs there, beside your repository",
        )
    builds = {"trainer": trainer_build(config, facts), "engine": engine_build(config, facts)}
    for environment in launch.environments:
        complete = posixpath.basename(environment.path) in facts.environments
        count = len(environment.requirements) + len(environment.requirements_no_deps)
        if environment.name == "engine" and config.engine:
            content = f"{count} requirements of {config.engine.requirements_file}"
        else:
            content = f"{count} requirements, constraints {config.host.constraints_file or 'none'}"
        yield PlanStep(
            f"{'reuse' if complete else 'build'} the {environment.name} environment {environment.path}"
            f"{'' if complete else f' with {environment.installer}'}",
            f"{content}, {_python_words(environment)}, {build_words(builds[environment.name])}: "
            f"{'complete there' if complete else 'none of this content there yet'}",
        )
    for tracker in launch.trackers:
        complete = posixpath.basename(tracker.environment.path) in facts.environments
        yield PlanStep(
            f"{tracker.process.window}: {shlex.join(tracker.process.argv)}",
            f"its own environment is {'complete there' if complete else 'made first'}; whatever becomes of it costs the"
            " run no step",
        )
    for model in launch.models:
        what = "" if model.weights else ", without its weights"
        why = "the hub's files, unless this host's cache has them; no engine's time limit counts it"
        yield PlanStep(f"download {model.name}{what}", why)
    if launch.slurm is None:
        yield PlanStep(
            f"start tmux session {launch.run_id} with a window per process",
            "the run goes on when this machine is switched off",
        )
    else:
        yield PlanStep(
            "\n       ".join(["submit this to sbatch:", *launch.slurm.script.splitlines()]),
            "Slurm starts the run when its nodes are free; all that follows is on them",
        )
    for check in launch.smoke:
        yield PlanStep(
            f"{check.process.window}: {shlex.join(check.process.argv)}",
            f"on {check.subject}: seconds, unless it passed there before; within {check.timeout_s:.0f} s",
        )
    if launch.network is not None:
        yield PlanStep(
            f"network: {shlex.join(launch.network.process.argv)}",
            f"{launch.network.subject}: all ranks meet, and its rate is measured",
        )
    for stage in launch.stages:
        for process in stage.processes():
            yield PlanStep(
                f"{stage.name}: {process.window}: {shlex.join(process.argv)}",
                _placed(config, process, facts),
            )


def _python_words(environment: EnvironmentSpec) -> str:
    if environment.base_python:
        return f"Python {environment.python_version}"
    return f"Python {environment.python_version}, installed there by uv, since no Python of the host fits"


def watch_step(local_dir: str) -> PlanStep:
    why = "metrics as they grow, each completed checkpoint, verified"
    return PlanStep(f"watch, and pull results into {local_dir}", why)


def _placed(config: Config, process: ProcessSpec, facts: HostFacts) -> str:
    devices = process.env.get(GPUS_VARIABLE)
    where = (
        f"GPU {devices}" if devices else "no GPU" if devices == "" else config.target.device_type
    )
    ready = f", ready when {process.ready_url} answers, within {process.ready_timeout_s:.0f} s"
    return f"on {where} of {facts.host}{ready if process.ready_url else ''}"
