"""The uv and the Python that make an environment: the host's, or ones that are put into the rollouts home.

<home>/tools/uv is the package index's; <home>/tools/python holds what `uv python install` brought, from
UV_PYTHON_INSTALL_MIRROR where that is set. Nothing needs root. Standard library only.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rollouts.run_dir import EnvironmentSpec
from rollouts.worker.environments import fetch_uv
from rollouts.worker.environments.installer import BootstrapError, InstallerFailed
from rollouts.worker.supervise.console import say

# where its installer puts it; not on PATH in a bare ssh command
UV_PLACES = "~/.local/bin/uv", "~/.cargo/bin/uv"
FIND_TIMEOUT_S = 60.0

# Runs one command as the bootstrap runs an installer; the mapping is its environment.
Run = Callable[[Sequence[str], Mapping[str, str]], None]


def tools_of(spec: EnvironmentSpec) -> Path:
    """Return the directory of what the host lacks, beside its environments."""
    return Path(spec.path).parents[1] / "tools"


def find_uv(spec: EnvironmentSpec, run: Run) -> str:
    """Return the host's uv, else fetch one from the package index. Raises BootstrapError."""
    own = tools_of(spec) / "uv"
    for place in ("uv", *(os.path.expanduser(place) for place in UV_PLACES), str(own)):
        if found := shutil.which(place):
            return found
    say(f"environment {spec.name}: the host has no uv; fetching it from the package index")
    run([sys.executable, "-I", fetch_uv.__file__, str(own)], os.environ)
    return str(own)


def base_python(spec: EnvironmentSpec, run: Run) -> str:
    """Return the interpreter that makes the environment, installed first where the host has none that fits."""
    if spec.base_python:
        return spec.base_python
    uv = find_uv(spec, run)
    environment = {
        **os.environ,
        "UV_PYTHON_INSTALL_DIR": str(tools_of(spec) / "python"),
        "UV_PYTHON_INSTALL_BIN": "0",
        "UV_PYTHON_PREFERENCE": "only-managed",
        "UV_NO_CONFIG": "1",
    }
    if found := _find(uv, spec, environment):
        return found
    say(
        f"environment {spec.name}: the host has no Python that fits; installing {spec.python_version}"
    )
    try:
        run([uv, "python", "install", "--no-progress", spec.python_version], environment)
    except InstallerFailed as error:
        raise BootstrapError(
            f"environment {spec.name!r}: it needs Python {spec.python_version}, which this host lacks, and uv could not"
            f" install it. Install python{spec.python_version} with its venv on the host, or set"
            " UV_PYTHON_INSTALL_MIRROR in host.env to a mirror of the releases that uv takes.",
            error.log_tail,
        ) from None
    if found := _find(uv, spec, environment):
        return found
    raise BootstrapError(
        f"environment {spec.name!r}: uv installed Python {spec.python_version}, and does not find it"
    )


def _find(uv: str, spec: EnvironmentSpec, environment: Mapping[str, str]) -> str:
    """Return the path of the Python that was installed; "" for none."""
    argv = [uv, "python", "find", "--no-project", "--no-python-downloads", spec.python_version]
    try:
        done = subprocess.run(
            argv,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=FIND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BootstrapError(f"environment {spec.name!r}: cannot run {uv}: {error}") from None
    return done.stdout.strip() if done.returncode == 0 else ""
