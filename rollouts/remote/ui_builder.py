"""The config builder of `deploy ui`: a config out of another one and changed fields, checked, written, started.

It begins from a config file of this repository, or from a run's config. A value is written as in a config file.
"""

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rollouts.config import Config, ConfigError, as_source, load_config
from rollouts.config.diff import MISSING, differences
from rollouts.config.explain import all_fields, section_docs, type_text
from rollouts.config.json_form import field_types
from rollouts.config.overrides import combinations, variants
from rollouts.config.source import commented_source, literal
from rollouts.remote.errors import DeployError
from rollouts.remote.inputs.data_files import count_parameters, read_model_config
from rollouts.remote.inputs.shapes import shape_named
from rollouts.remote.new_config import USABLE_SHARE
from rollouts.remote.plan.memory import Card, Models
from rollouts.remote.plan.memory.engine_memory import GIB
from rollouts.remote.plan.memory.uses import gpu_uses
from rollouts.remote.plan.memory.words import memory_lines
from rollouts.remote.run import registry
from rollouts.view.escape import escaped
from rollouts.view.ui.run_source import PageError

CONFIGS = Path("configs")
COMMAND = (
    Path(__file__).resolve().parents[2] / "deploy.py"
)  # the server's own, whatever lies in the working directory
COMMAND_S = 900.0  # for a plan, or a launch, of which a host may install environments
SETTINGS_MAX = 500
_CONFIG = re.compile(r"^config\b[^=\n]*=", re.MULTILINE)  # what a config file ends with


class Builder:
    """Configs of the repository that the command was started in. `remote`: where runs are started."""

    def __init__(self, remote: str | None) -> None:
        self._remote = remote

    @property
    def target(self) -> str:
        return self._remote or "this machine"

    def bases(self) -> list[str]:
        """Return what one may begin from: config files here, then runs, the newest first."""
        files = [file for folder in (CONFIGS, Path()) for file in sorted(folder.glob("*.py"))]
        configs = [str(file) for file in files if _CONFIG.search(_text(file))]
        return [*configs, *(entry.run_id for entry in reversed(registry.entries()))]

    def fields(self, base: str) -> dict[str, Any]:
        """Return every field of a config with its value and what it means. Raises PageError."""
        return {"base": base, "fields": list(_fields(self._config(base, ()), ""))}

    def checked(
        self, base: str, settings: Sequence[str], *, gpu_memory_gib: float, other: str
    ) -> dict[str, Any]:
        """Return a config's problems, memory and file, and how it differs from another. Raises PageError."""
        try:
            config = self._config(base, settings)
        except PageError as error:
            return {
                "problems": str(error).splitlines(),
                "memory": [],
                "source": "",
                "differences": [],
            }
        found = differences(self._config(other or base, ()), config)
        return {
            "problems": list(config.problems()),
            "memory": _memory(config, gpu_memory_gib),
            "source": as_source(config),
            "differences": [[item.path, _shown(item.before), _shown(item.after)] for item in found],
        }

    def write(self, base: str, settings: Sequence[str], name: str) -> dict[str, Any]:
        """Write the config as a file that spells out every field. Raises PageError."""
        file = _new_file(name)
        config = self._config(base, settings)
        if problems := config.problems():
            raise PageError(f"{len(problems)} problem(s): {'; '.join(problems[:3])}", status=400)
        heading = f"{config.output.experiment_name}: made from {base} in the page of `deploy ui`."
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(commented_source(config, heading))
        except OSError as error:
            raise PageError(f"{file}: cannot be written: {error.strerror}", status=400) from None
        return {"file": str(file)}

    def run(self, name: str, *, start: bool) -> dict[str, Any]:
        """Return what `deploy FILE --plan` says, or start the run and return what was said. Raises PageError."""
        if not Path(name).is_file() or Path(name).suffix != ".py":
            raise PageError(f"{name}: write the config first", status=400)
        remote = ["--remote", self._remote] if self._remote else []
        command = [
            sys.executable,
            str(COMMAND),
            name,
            *remote,
            "--detach" if start else "--plan",
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PageError(
                f"it took more than {COMMAND_S:.0f} s: look with `deploy ls`", status=504
            ) from None
        return {
            "code": done.returncode,
            "text": escaped(done.stdout + done.stderr),
            "started": start,
        }

    def _config(self, base: str, settings: Sequence[str]) -> Config:
        if base not in self.bases():
            raise PageError(f"{base!r} is not a config file here, nor a run of this machine")
        try:
            entry = registry.find(base) if not base.endswith(".py") else None
            config = load_config(entry.mirror.config if entry else base)
            if len(settings) > SETTINGS_MAX or combinations(settings) > 1:
                raise ConfigError(
                    "a comma begins another run's value: put a list in brackets, a text in quotes"
                )
            return variants(config, settings)[0].config
        except (ConfigError, DeployError) as error:
            raise PageError(str(error).replace("--set ", ""), status=400) from None


def _fields(value: Any, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of a section, each part of it after the field that holds it."""
    meanings = {(field.section, field.name): field.meaning for field in all_fields()}
    for name, expected in field_types(type(value)).items():
        item, path = getattr(value, name), f"{prefix}{name}"
        is_list = isinstance(item, list) and any(map(dataclasses.is_dataclass, item))
        is_group = dataclasses.is_dataclass(item) or is_list
        meaning = meanings.get((type(value).__name__, name), "")
        shown = (
            (type(item).__name__ if not is_list else f"{len(item)} items")
            if is_group
            else literal(item)
        )
        yield {
            "path": path,
            "value": shown,
            "type": type_text(expected),
            "choices": [] if is_group else _choices(expected),
            "meaning": meaning or section_docs().get(type(item).__name__, ""),
            "group": is_group,
        }
        for at, part in enumerate(item) if is_list else [(None, item)] if is_group else ():
            yield from _fields(part, f"{path}." if at is None else f"{path}.{at}.")


def _choices(expected: Any) -> list[str]:
    """Return the values that a field may have, as one writes them; [] where there is no end of them."""
    if expected is bool:
        return ["True", "False"]
    if typing.get_origin(expected) is Literal:
        return [literal(choice) for choice in typing.get_args(expected)]
    parts = typing.get_args(expected) if type(None) in typing.get_args(expected) else ()
    found = [["None"] if part is type(None) else _choices(part) for part in parts]
    return [choice for part in found for choice in part] if found and all(found) else []


def _memory(config: Config, gpu_memory_gib: float) -> list[str]:
    """Return the table of memory on GPUs of that size; on a CPU []."""
    if config.target.device_type != "cuda":
        return []
    folder = Path(config.model.name)
    known = read_model_config(folder) if folder.is_dir() else None
    policy = shape_named(config.model.name, {config.model.name: known} if known else {})
    parameters = count_parameters(folder, from_weights=True) if folder.is_dir() else None
    ranks = {
        *config.target.gpu_ranks,
        *(config.engine.gpu_ranks if config.engine and config.uses_engine else ()),
    }
    whole = int(gpu_memory_gib * GIB)
    cards = {rank: Card(have=int(USABLE_SHARE * whole), total=whole) for rank in ranks}
    has_kl = config.rl is not None and config.rl.kl is not None
    models = Models(policy=policy, reference=policy if has_kl else None, parameters=parameters)
    return list(memory_lines(list(gpu_uses(config, models, cards)), cards))


def _new_file(name: str) -> Path:
    """Return the path of a file that is to be written under the working directory. Raises PageError."""
    file = Path(name)
    inside = not file.is_absolute() and file.resolve().is_relative_to(Path.cwd())
    if file.suffix != ".py" or not inside:
        raise PageError(f"{name!r}: needs the name of a .py file under {Path.cwd()}", status=400)
    if not file.parent.is_dir() or file.exists():
        raise PageError(
            f"{name}: {'exists already' if file.exists() else 'has no such directory'}", status=400
        )
    return file


def _shown(value: Any) -> str:
    return "-" if value == MISSING else value if isinstance(value, str) else literal(value)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
