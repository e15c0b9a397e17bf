"""Environments for tests: tiny wheels, and what a built one holds."""

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments.installer import BootstrapDeadline
from tests.worker.stands import PATIENCE_S, events


def write_wheel(directory: Path, name: str, version: str, *, requires: str = "") -> None:
    """Write a pure Python package whose module says its version."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(directory / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", f"version = {version!r}\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def deadline(
    timeout_s: float = PATIENCE_S, tick: Callable[[], None] = lambda: None
) -> BootstrapDeadline:
    return BootstrapDeadline(timeout_s, tick=tick)


def actions(run: RunDir) -> list[str]:
    return [row["action"] for row in events(run, "environment")]


def version_in(spec: EnvironmentSpec) -> str:
    command = [f"{spec.path}/bin/python", "-c", "import tiny_thing; print(tiny_thing.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
