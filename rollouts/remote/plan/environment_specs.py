"""The environments of a run: what is installed, for which Python and torch, named by what they hold. Pure."""

import hashlib
import json
from collections.abc import Collection

from rollouts.config import Config
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan.torch_build import base_python, engine_build, trainer_build
from rollouts.remote.repository import Code
from rollouts.run_dir import EnvironmentSpec


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
            (no_deps if comment.strip().startswith("no-deps") else plain).append(
                requirement.strip()
            )
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
    return _environment(
        "trainer", config, facts, list(code.requirements), constraints=code.constraints, no_deps=[]
    )


def environments_of(config: Config, facts: HostFacts, code: Code) -> list[EnvironmentSpec]:
    """Return the trainer's environment, and the engine's if it has a lock."""
    assert code.engine_requirements is not None, "a plan without problems"
    trainer = trainer_environment(config, facts, code)
    requirements, no_deps = read_lock(code.engine_requirements)
    if not requirements and not no_deps:
        return [trainer]
    return [
        trainer,
        _environment("engine", config, facts, requirements, constraints="", no_deps=no_deps),
    ]
