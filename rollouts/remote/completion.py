"""What a shell may complete: names of runs, configs, fields and hosts, from what lies on this machine. Nobody is asked.

typer's own scripts ask for it (`deploy --install-completion`), at every Tab: nothing slow is imported.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from rollouts.run_dir import home_dir

CONFIG_BYTES_MAX = 100_000  # of a file that may be a config
FILES_MAX = 500  # of one directory


def run_names(incomplete: str) -> list[str]:
    """Return runs, tags and `last`, of those that this machine knows."""
    from rollouts.remote.run import registry
    from rollouts.remote.run.run_names import LAST
    from rollouts.remote.run.tags import tags

    ids = registry.run_ids()
    return _fitting([*ids, *tags(), *([LAST] if ids else [])], incomplete)


def run_files(incomplete: str) -> list[str]:
    """Return RUN: of each run; after that what is on this machine of it."""
    from rollouts.remote.errors import DeployError
    from rollouts.remote.host.transport import LOCAL_TARGET
    from rollouts.remote.run.run_names import known_run

    name, colon, path = incomplete.partition(":")
    if not colon:
        return [f"{run}:" for run in run_names(incomplete)]
    folder, slash, begun = path.rpartition("/")
    try:
        entry = known_run(name.partition("@")[0])
        is_here = entry.target == LOCAL_TARGET and Path(entry.run_path).is_dir()
        files = _files_of(Path(entry.run_path if is_here else entry.local_dir) / folder, begun)
    except (OSError, DeployError):
        return []
    shown = [f"{name}:{folder}{slash}{file.name}{'/' if file.is_dir() else ''}" for file in files]
    return _fitting(shown, incomplete)


def config_files(incomplete: str) -> list[str]:
    """Return the configs in the directory that is being typed."""
    folder, slash, begun = incomplete.rpartition("/")
    try:
        files = _files_of(Path(f"{folder}{slash}" or ".").expanduser(), begun)
    except OSError:
        return []
    found = [file for file in files if file.suffix == ".py" and _is_config(file)]
    return _fitting([f"{folder}{slash}{file.name}" for file in found], incomplete)


def configs_and_runs(incomplete: str) -> list[str]:
    return [*config_files(incomplete), *run_names(incomplete)]


def fields(incomplete: str) -> list[str]:
    """Return the fields of a config, one level below what is being typed."""
    from rollouts.config.explain import all_fields

    plain = (re.sub(r"\[\w*\]", "", field.path) for field in all_fields())
    found = _fitting(dict.fromkeys(plain), incomplete)
    return [path for path in found if path.count(".") <= incomplete.count(".") + 1]


def settings(incomplete: str) -> list[str]:
    """Return FIELD= of each field."""
    return [f"{field}=" for field in fields(incomplete)] if "=" not in incomplete else []


def targets(incomplete: str) -> list[str]:
    """Return the hosts of the runs that this machine knows, the last first."""
    from rollouts.remote.host.transport import LOCAL_TARGET
    from rollouts.remote.run import registry

    known = dict.fromkeys(entry.target for entry in reversed(registry.entries()))
    return _fitting((target for target in known if target != LOCAL_TARGET), incomplete)


def tag_names(incomplete: str) -> list[str]:
    from rollouts.remote.run.tags import tags

    return _fitting(tags(), incomplete)


def experiments(incomplete: str) -> list[str]:
    from rollouts.remote.run import registry

    return _fitting(
        dict.fromkeys(entry.experiment_name for entry in registry.entries()), incomplete
    )


def states(incomplete: str) -> list[str]:
    """Return states, also after a comma."""
    from rollouts.remote.list_runs import STATES

    before, comma, _ = incomplete.rpartition(",")
    return _fitting((f"{before}{comma}{state.replace(' ', '-')}" for state in STATES), incomplete)


def sorts(incomplete: str) -> list[str]:
    from rollouts.remote.list_runs import SORTS

    return _fitting(SORTS, incomplete)


def machine_names(incomplete: str) -> list[str]:
    """Return the rented machines that this machine can reach."""
    directory = home_dir() / "cloud" / "machines"
    return _fitting((path.name for path in sorted(directory.glob("*"))), incomplete)


def _files_of(directory: Path, begun: str) -> list[Path]:
    """Return the first files of a directory that begin so; hidden ones where that is typed. Raises OSError."""
    names = sorted(name for name in os.listdir(directory) if name.startswith(begun))
    shown = [name for name in names if begun or not name.startswith(".")]
    return [directory / name for name in shown[:FILES_MAX]]


def _is_config(file: Path) -> bool:
    """Return whether a file builds a `config`, as far as its text tells."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(CONFIG_BYTES_MAX)
    except OSError:
        return False
    return re.search(r"^config\b\s*(:.*)?=", text, re.MULTILINE) is not None


def _fitting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
