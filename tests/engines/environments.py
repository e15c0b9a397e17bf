"""Interpreters of the engines' own environments: an override by variable, else built once per machine and kept."""

import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

from rollouts.remote.plan import environment_key, read_lock
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments.installer import BootstrapDeadline
from rollouts.worker.environments.virtual_environment import ensure_environment

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENTS_VARIABLE = "ROLLOUTS_TEST_ENVIRONMENTS"  # as in tests/e2e
OVERRIDES = {"sglang": "ROLLOUTS_TEST_SGLANG_PYTHON", "vllm": "ROLLOUTS_TEST_VLLM_PYTHON"}
LOCKS = {"sglang": "requirements/sglang-cpu.txt"}
BUILD_TIMEOUT_S = 1800.0


def interpreter(kind: str) -> str:
    """A Python that has this kind of engine.

    What ROLLOUTS_TEST_<KIND>_PYTHON names; else SGLang's lock, installed as a run would install it, into the directory
    that the end to end tests keep theirs in, under the same name: a run finds it there too. Raises KeyError for vLLM
    without the variable: its build for a CPU takes steps that no lock can say (requirements/vllm-cpu.txt).
    """
    given = os.environ.get(OVERRIDES[kind])
    if given:
        return given
    requirements, no_deps = read_lock((REPOSITORY / LOCKS[kind]).read_text())
    home = Path(os.environ.get(ENVIRONMENTS_VARIABLE) or Path.home() / ".cache" / "rollouts-tests" / "envs")
    key = environment_key(requirements, "", "pip", platform.python_version(), sysconfig.get_platform(), no_deps=no_deps)
    spec = EnvironmentSpec(
        name="engine",
        path=str(home / key),
        installer="pip",
        base_python=str(Path(sys.base_prefix) / "bin" / "python3"),
        requirements=requirements,
        requirements_no_deps=no_deps,
        constraints="",
    )
    with tempfile.TemporaryDirectory() as events:
        ensure_environment(spec, RunDir(Path(events)), BootstrapDeadline(BUILD_TIMEOUT_S, tick=lambda: None))
    return f"{spec.path}/bin/python"
