"""`Config`: a job as one value, with its checks and its JSON round trip."""

import json
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config.checks import config_problems, fewer_hosts
from rollouts.config.earlier import in_todays_form
from rollouts.config.field_types import ConfigError
from rollouts.config.json_form import from_json, json_lines, line_of, to_json
from rollouts.config.schema import Sections


@dataclass(frozen=True, kw_only=True)
class Config(Sections):
    """A whole job. `problems()` lists every reason it cannot run; `save` and `load` are a JSON round trip."""

    def problems(self) -> tuple[str, ...]:
        """Return every reason this config cannot run; empty when it can."""
        return config_problems(self)

    def fewer_hosts(self) -> list[int]:
        """Return with how many of its hosts it may go on where others die; [] for none."""
        return fewer_hosts(self)

    def to_json(self) -> dict[str, Any]:
        return typing.cast(dict[str, Any], to_json(self, Config))

    @classmethod
    def from_json(cls, data: Any) -> "Config":
        """Invert `to_json`. Raises ConfigError naming every missing and unknown key."""
        errors: list[tuple[str, str]] = []
        config = from_json(cls, data, "config", errors)
        if errors:
            raise ConfigError("\n".join(f"{path}: {message}" for path, message in errors))
        return typing.cast(Config, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        text = json.dumps(self.to_json(), indent=2) + "\n"
        temporary = Path(f"{os.fspath(path)}.tmp")
        temporary.write_text(text)
        temporary.replace(path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], say: Callable[[str], None] | None = None
    ) -> "Config":
        """Read what `save` wrote, in the flat form of earlier versions too; `say` is told so once.

        Raises ConfigError naming the file and the line of every missing, unknown and doubled key.
        """
        file = Path(path)
        # a pipe waits for its other end, a device has no end
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ConfigError(f"{path}: is not a plain file")
        try:
            text = file.read_text()
            data = json.loads(text)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            # a number of too many digits; brackets too deep
            raise ConfigError(f"{path}: cannot be read as a config: {error}") from None
        errors: list[tuple[str, str]] = []
        data, of_earlier = in_todays_form(data)
        if of_earlier and say is not None:
            say(
                f"{path}: was written by an earlier version, and is read in today's form; --show prints that"
            )
        config = from_json(cls, data, "config", errors)
        lines, twice = json_lines(text)
        errors += [(key, "given twice") for key in twice]
        if errors:
            shown = [(line_of(key, lines), f"{key}: {message}") for key, message in errors]
            raise ConfigError(
                "\n".join(f"{path}:{line}: {message}" for line, message in sorted(shown))
            )
        return typing.cast(Config, config)
