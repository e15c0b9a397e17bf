"""Read a config file."""

import difflib
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollouts.config.field_types import ConfigError
from rollouts.config.job import Config
from rollouts.config.mistakes import describe_exception, field_mistakes

_LOADING: list[Path] = []  # files that are being executed: one may load another
NO_CONFIGS = (".md", ".txt", ".yaml", ".yml", ".toml", ".ini", ".sh", ".jsonl", ".ipynb", ".log")


def load_config(path: str | os.PathLike[str], say: Callable[[str], None] | None = None) -> Config:
    """Execute a config file once (or read a run's config.json) and return its `config`.

    Raises ConfigError for a missing file, a syntax error (with its line), an exception in the file (with its line),
    unknown and missing fields (all at once, each with its line and the nearest name), a file without `config`, or one
    whose `config` is not a Config. It does not check `problems()`. `say` is told of a config.json of an
    earlier version.
    """
    file = Path(path)
    if file.suffix == ".json":
        return Config.load(file, say)
    if file.is_dir():
        raise ConfigError(f"{file}: is a directory; a config is a .py file.{_near_file(file)}")
    if not file.exists():
        shipped = (
            " Shipped configs are in configs/."
            if Path("configs/00_cpu_sft_rl.py").is_file()
            else ""
        )
        raise ConfigError(f"{file}: no such file.{_near_file(file)}{shipped}")
    if not file.is_file():
        raise ConfigError(f"{file}: is not a plain file.")
    if file.suffix in NO_CONFIGS:
        raise ConfigError(
            f"{file}: is not a config: that is a .py file that ends with `config = Config(...)`."
        )
    names = _names_of(file)
    if "config" not in names:
        raise ConfigError(
            f"{file}: defines no `config`. A config file ends with `config = Config(...)`."
        )
    config = names["config"]
    if not isinstance(config, Config):
        raise ConfigError(
            f"{file}: `config` is {type(config).__name__}, needs to be a Config of rollouts.config."
        )
    return config


def _names_of(file: Path) -> dict[str, Any]:
    """Return what executing a config file defines."""
    if file.resolve() in _LOADING:
        chain = " -> ".join(path.name for path in (*_LOADING, file))
        raise ConfigError(f"{file}: loads itself: {chain}. A config derives from another file.")
    _LOADING.append(file.resolve())
    try:
        if b"\0" in file.read_bytes():
            # Python 3.11.3 and older raise ValueError
            raise SyntaxError("it has zero bytes, as no text has")
        return runpy.run_path(str(file))
    except SyntaxError as error:
        line = (error.text or "").rstrip()
        if error.filename is None:  # not text at all
            raise ConfigError(f"{file}: is not a config: {error.msg}") from None
        raise ConfigError(
            f"{error.filename}:{error.lineno}: {error.msg}\n    {line.strip()}"
        ) from None
    except (Exception, SystemExit) as error:
        # whatever a user's file raises is shown with its line, not our traceback
        mistakes = (
            field_mistakes(file)
            if isinstance(error, TypeError) and "__init__() " in str(error)
            else []
        )
        raise ConfigError("\n".join(mistakes) or describe_exception(file, error)) from None
    finally:
        _LOADING.pop()


def _near_file(file: Path) -> str:
    """Return " Did you mean configs/x.py?", of the .py files beside `file` and in configs/; "" where none is near."""
    folders = dict.fromkeys((file.parent, file, Path("configs")))
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.py"))]
    names = [path.name for path in paths]
    near = difflib.get_close_matches(file.name.removesuffix(".py") + ".py", names, n=1, cutoff=0.6)
    return f" Did you mean {paths[names.index(near[0])]}?" if near else ""
