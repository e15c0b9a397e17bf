"""The config that a command line names: read, checked, shown."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rollouts.config import Config, ConfigError, as_source, load_config
from rollouts.config.overrides import Variant, combinations, variants
from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.run.mirror_note import read_note
from rollouts.run_dir import RunDir
from rollouts.view.answer import Answer


def show_config(path: str, settings: Sequence[str] = ()) -> Answer:
    """Return the whole config, as a file that derives from no other one (`deploy CONFIG --show`)."""
    with as_deploy_errors():
        if combinations(settings) > 1:
            raise DeployError(
                "--show prints one config, and --set asks for several.",
                fix="name one value a field",
            )
        config = read_variants(path, settings)[0].config
        return Answer(config.to_json(), as_source(config).removesuffix("\n"))


def read_config(path: str) -> Config:
    """Read the config and check it: every problem at once. A run directory means its config.json."""
    return read_variants(path, ())[0].config


def read_variants(path: str, settings: Sequence[str]) -> list[Variant]:
    """Return the runs that a config and its `--set` settings ask for, each checked: every problem at once."""
    try:
        found = variants(_load(path), settings)
    except ConfigError as error:
        raise DeployError(str(error)) from None
    problems: dict[str, list[str]] = {}  # of which runs, by its text
    for variant in found:
        for problem in (*variant.config.problems(), *_nul_bytes(variant.config.to_json())):
            problems.setdefault(problem, []).append(variant.label)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = [_of_runs(labels, len(found)) + problem for problem, labels in problems.items()]
        raise DeployError(f"{path}: {count} in the config.", found="\n".join(lines))
    return found


def _of_runs(labels: list[str], of: int) -> str:
    """Return of which runs of a sweep something is said; "" where it is of all."""
    if len(labels) == of:
        return ""
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return f"{', '.join(labels[:3])}{more}: "


def _load(path: str) -> Config:
    """Return the config at a path, unchecked."""
    file = Path(path)
    if file.is_dir():
        file = _config_of(file)
    if file.name == "config.json" and read_note(RunDir(file.parent)).get("started_here") is False:
        raise DeployError(
            f"{file} came from a host, with a run that was started elsewhere.",
            found="it names the files to read, the code to run and the secrets to send",
            fix="read it, copy it to a place of your own, and deploy the copy",
        )
    try:
        return load_config(file, say=lambda text: print(f"note: {text}", file=sys.stderr))
    except ConfigError as error:
        raise DeployError(str(error)) from None


def _config_of(directory: Path) -> Path:
    """Return the config.json of a run directory. Raises DeployError for another directory."""
    if (directory / "config.json").is_file():
        return directory / "config.json"
    # the newest first
    runs = sorted((file.parent for file in directory.glob("*/config.json")), reverse=True)
    configs = (sorted(directory.glob("*.py")) or runs)[:8]
    raise DeployError(
        f"{directory} is a directory, and no run's: it has no config.json.",
        found="\n".join(map(str, configs)),
        needed="a config file, a run's config.json, or a run directory",
        fix=f"name the file, for example: deploy {configs[0]}" if configs else "check the path",
    )


def _nul_bytes(value: object, place: str = "") -> Iterator[str]:
    """Name the texts of a config with a zero byte: no path, variable or command line can hold one."""
    if isinstance(value, str) and "\0" in value:
        yield f"{place}={value!r}: needs a text without a zero byte"
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in parts:
        yield from _nul_bytes(part, f"{place}.{key}" if place else str(key))
