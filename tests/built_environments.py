"""Environments that take long to install: built once per machine as a run would build them, under the same name, and
kept."""

import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch

from rollouts.remote.plan import environment_key
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments.installer import BootstrapDeadline
from rollouts.worker.environments.virtual_environment import ensure_environment
from scripts.uv_settings import settings_of_this_machine

# of this account, before any test moves its home
ACCOUNT = dict(os.environ)
ENVIRONMENTS = Path(
    ACCOUNT.get("ROLLOUTS_TEST_ENVIRONMENTS") or Path.home() / ".cache" / "rollouts-tests" / "envs"
)
UV_CACHE = Path.home() / ".cache" / "uv"
BUILD_TIMEOUT_S = 1800.0


@cache
def installer_settings() -> dict[str, str]:
    """What this account tells pip, said to uv, for laptops and hosts whose HOME is another: environments are built in
    the way that this machine can, from its CPU wheel where it has one, and of the wheels that .venv was made of."""
    return {"UV_CACHE_DIR": str(UV_CACHE), **settings_of_this_machine(ACCOUNT)}


def interpreter_with(name: str, requirements: Sequence[str], no_deps: Sequence[str] = ()) -> str:
    """Return a Python that has these requirements, in the directory that the end to end tests keep theirs in."""
    key = environment_key(
        requirements,
        "",
        "uv",
        platform.python_version(),
        sysconfig.get_platform(),
        no_deps=no_deps,
    )
    spec = EnvironmentSpec(
        name=name,
        path=str(ENVIRONMENTS / key),
        installer="uv",
        base_python=str(Path(sys.base_prefix) / "bin" / "python3"),
        requirements=list(requirements),
        requirements_no_deps=list(no_deps),
        constraints="",
    )
    found = {**installer_settings(), "PATH": f"{Path(sys.executable).parent}:{ACCOUNT['PATH']}"}
    with tempfile.TemporaryDirectory() as events, patch.dict(os.environ, found):
        ensure_environment(
            spec, RunDir(Path(events)), BootstrapDeadline(BUILD_TIMEOUT_S, tick=lambda: None)
        )
    return f"{spec.path}/bin/python"
