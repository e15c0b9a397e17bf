"""The trackers of a run: what their environments hold, and what feeds them. Pure."""

from collections.abc import Collection, Iterator

from rollouts.config import Config, Mlflow, Trackio, Wandb
from rollouts.config.schema.trackers import TrackerConfig
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.environment_specs import environment_key
from rollouts.remote.plan.process_env import process_env
from rollouts.remote.plan.torch_build import base_python
from rollouts.remote.repository import Code
from rollouts.run_dir import EnvironmentSpec, ProcessSpec, RunDir, TrackerSpec

WANDB_KEY = "WANDB_API_KEY"


def tracker_specs(config: Config, facts: HostFacts, code: Code, run: RunDir) -> list[TrackerSpec]:
    """Return each tracker with its environment and the process that feeds it."""
    return [_spec(tracker, config, facts, code, run) for tracker in config.output.fed]


def tracker_problems(config: Config, code: Code) -> Iterator[Problem]:
    """Name the trackers whose package this version of rollouts does not name."""
    for tracker in config.output.fed:
        if not code.tracker_requirements.get(tracker.kind):
            yield Problem(
                f"output.trackers: {tracker.kind!r} has no package.",
                needed="an extra of rollouts that names it: `trackers` in its pyproject.toml",
                fix="install a rollouts that has it, or take the tracker out",
            )


def tracker_warnings(config: Config, secrets_set: Collection[str]) -> Iterator[str]:
    """Say what a tracker will most likely lack. It would cost the run nothing."""
    for tracker in config.output.fed:
        online = isinstance(tracker, Wandb) and config.host.env.get("WANDB_MODE") != "offline"
        if online and not tracker.offline and WANDB_KEY not in secrets_set:  # type: ignore[union-attr]
            yield (
                f"W&B gets nothing unless the host is logged in: {WANDB_KEY} is not in host.secrets, or not set here"
            )


def _spec(
    tracker: TrackerConfig, config: Config, facts: HostFacts, code: Code, run: RunDir
) -> TrackerSpec:
    environment = _environment(tracker, config, facts, code)
    window = f"tracker-{tracker.kind}"
    argv = [
        *(f"{environment.path}/bin/python", "-m", "rollouts.view.feed"),
        *(str(run.path), tracker.kind, tracker.project, _directory(tracker, facts, run)),
    ]
    process = ProcessSpec(
        window=window,
        argv=argv,
        env={**_own_env(tracker), **process_env(config, facts, code, run, [])},
        ready_url=None,
        ready_timeout_s=0.0,
    )
    return TrackerSpec(
        kind=tracker.kind, project=tracker.project, environment=environment, process=process
    )


def _environment(
    tracker: TrackerConfig, config: Config, facts: HostFacts, code: Code
) -> EnvironmentSpec:
    requirements = list(code.tracker_requirements.get(tracker.kind, ()))
    python, installer = base_python(config, facts, engine=False), config.host.installer
    key = environment_key(requirements, "", installer, python.version, facts.platform)
    return EnvironmentSpec(
        name=f"tracker-{tracker.kind}",
        path=f"{facts.home}/envs/{key}",
        installer=installer,
        base_python=python.path,
        requirements=requirements,
        requirements_no_deps=[],
        constraints="",
        python_version=python.version,
    )


def _directory(tracker: TrackerConfig, facts: HostFacts, run: RunDir) -> str:
    """Return where files of the tracker's own go: W&B's come along with the results."""
    if isinstance(tracker, Wandb):
        return str(run.path)
    named = None if isinstance(tracker, Mlflow) else tracker.directory
    return named or f"{facts.home}/trackers/{tracker.kind}"


def _own_env(tracker: TrackerConfig) -> dict[str, str]:
    if isinstance(tracker, Wandb):
        return {"WANDB_MODE": "offline" if tracker.offline else "online"}
    if isinstance(tracker, Mlflow) and tracker.tracking_uri is not None:
        return {"MLFLOW_TRACKING_URI": tracker.tracking_uri}
    if isinstance(tracker, Trackio) and tracker.directory is not None:
        return {"TRACKIO_DIR": tracker.directory}
    return {}
