"""Read a config file."""

import os
import runpy
from collections.abc import Callable
from pathlib import Path

from rollouts.config.config import Config
from rollouts.config.mistakes import describe_exception, field_mistakes
from rollouts.config.types import ConfigError


def load_config(path: str | os.PathLike[str], say: Callable[[str], None] | None = None) -> Config:
    """Execute a config file once (or read a run's config.json) and return its `config`.

    Raises ConfigError for a missing file, a syntax error (with its line), an exception in the file (with its line),
    unknown and missing fields (all at once, each with its line and the nearest name), a file without `config`, or one
    whose `config` is no Config. It does not check `problems()`. `say` is told of a config.json of an
    earlier version.
    """
    file = Path(path)
    if file.suffix == ".json":
        return Config.load(file, say)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file. Shipped configs are in configs/.")
    try:
        names = runpy.run_path(str(file))
    except SyntaxError as error:
        line = (error.text or "").rstrip()
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}\n    {line.strip()}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file raises is shown with its line, not our traceback
        mistakes = field_mistakes(file) if isinstance(error, TypeError) and "__init__() " in str(error) else []
        raise ConfigError("\n".join(mistakes) or describe_exception(file, error)) from None
    if "config" not in names:
        raise ConfigError(f"{file}: defines no `config`. A config file ends with `config = Config(...)`.")
    config = names["config"]
    if not isinstance(config, Config):
        raise ConfigError(f"{file}: `config` is {type(config).__name__}, needs to be base_config.Config.")
    return config
