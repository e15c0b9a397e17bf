"""What a host's environment may not decide: which code Python runs, and what pip and uv install where.

A run's environments are named by their requirements, so nothing else may act on them. Of the variables and settings of
Python, pip and uv only those below pass: indexes, certificates, proxies, caches, and how much is said. The rest is left
out, with a note. What `host.env` of the config sets is declared, and passes whatever its name. Standard library only.
"""

import ast
import re
from collections.abc import Iterable, Mapping

PYTHON_KEPT = frozenset(
    {
        "PYTHONASYNCIODEBUG",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONFAULTHANDLER",
        "PYTHONHASHSEED",
        "PYTHONIOENCODING",
        "PYTHONMALLOC",
        "PYTHONNOUSERSITE",
        "PYTHONPYCACHEPREFIX",
        "PYTHONTRACEMALLOC",
        "PYTHONUNBUFFERED",
        "PYTHONUTF8",
        "PYTHONWARNINGS",
    }
)
PIP_KEPT = frozenset(
    {
        "break-system-packages",
        "cache-dir",
        "cert",
        "client-cert",
        "config-file",
        "default-timeout",
        "disable-pip-version-check",
        "extra-index-url",
        "find-links",
        "index-url",
        "keyring-provider",
        "log",
        "no-binary",
        "no-cache-dir",
        "no-color",
        "no-index",
        "no-input",
        "only-binary",
        "prefer-binary",
        "progress-bar",
        "proxy",
        "quiet",
        "resume-retries",
        "retries",
        "root-user-action",
        "timeout",
        "trusted-host",
        "uploaded-prior-to",
        "use-deprecated",
        "use-feature",
        "verbose",
    }
)
UV_KEPT = frozenset(
    {
        "UV_CACHE_DIR",
        "UV_CONFIG_FILE",
        "UV_DEFAULT_INDEX",
        "UV_EXTRA_INDEX_URL",
        "UV_FIND_LINKS",
        "UV_INDEX",
        "UV_INSECURE_HOST",
        "UV_KEYRING_PROVIDER",
        "UV_LINK_MODE",
        "UV_NATIVE_TLS",
        "UV_NO_BINARY",
        "UV_NO_CACHE",
        "UV_NO_INDEX",
        "UV_NO_PROGRESS",
        "UV_OFFLINE",
        "UV_PYTHON_DOWNLOADS_JSON_URL",
        "UV_REQUEST_TIMEOUT",
        "UV_SYSTEM_CERTS",
        "UV_TORCH_BACKEND",
    }
)
UV_KEPT_PREFIXES = ("UV_INDEX_", "UV_HTTP_", "UV_CONCURRENT_", "UV_PYTHON_INSTALL_")
ELSEWHERE = frozenset({"VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "_CONDA_ROOT", "__PYVENV_LAUNCHER__"})
# PET_: torchrun's options, which clusters set for their own jobs
ELSEWHERE_PREFIXES = "CONDA_", "_CE_", "PET_"
# PYTHON_VERSION and the like are those of images, not Python's
INTERPRETERS_OWN = re.compile(r"PYTHON[A-Z0-9]+")


def redirects(name: str) -> bool:
    """Return whether a variable of this name, unless declared, may change what Python runs or an installer does."""
    if name.startswith("PIP_"):
        return _option(name.removeprefix("PIP_")) not in PIP_KEPT
    if name.startswith("UV_"):
        return name not in UV_KEPT and not name.startswith(UV_KEPT_PREFIXES)
    if INTERPRETERS_OWN.fullmatch(name):
        return name not in PYTHON_KEPT
    return name in ELSEWHERE or name.startswith(ELSEWHERE_PREFIXES)


def left_out_note(names: Iterable[str]) -> str:
    return (
        f"left out of the run's environment: {', '.join(sorted(names))}. This host sets them, and they would change"
        " what Python runs or what is installed. host.env of the config can set them."
    )


def pip_settings(config_list: str) -> tuple[dict[str, str], list[str]]:
    """Read `pip config list`. Return the variables that stand for what may pass of its files, and what may not.

    pip reads `[install]` over `[global]`, and variables over both. With these variables set and no file read, it does
    as before, less what was left out.
    """
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for line in config_list.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.partition(".")
        if section in found:
            found[section][_option(option)] = _unquoted(value)
    settings = {**found["global"], **found["install"]}
    kept = {
        f"PIP_{option.replace('-', '_').upper()}": text
        for option, text in settings.items()
        if option in PIP_KEPT
    }
    return kept, sorted(option for option in settings if option not in PIP_KEPT)


def split(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return what of an environment passes, and the names that do not."""
    left_out = sorted(name for name in environment if redirects(name))
    return {name: value for name, value in environment.items() if name not in left_out}, left_out


def _option(name: str) -> str:
    return name.lower().replace("_", "-").lstrip("-")


def _unquoted(value: str) -> str:
    """Undo the quotes of `pip config list`; several values stand in one, between line ends or spaces."""
    try:
        text = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        text = value
    return " ".join(str(text).split())
