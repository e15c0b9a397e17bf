"""API keys, from where each provider's own tools keep them. They are shown nowhere."""

import hashlib
import importlib.util
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.machine_types import ProviderName

# Variables that hold a secret, by their names; shorter values are words that an answer may hold too
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
SECRET_LENGTH_MIN = 12


@dataclass(frozen=True)
class ProviderKey:
    """An API key. `secret` is not part of its repr; `source` says where it was read."""

    secret: str = field(repr=False)
    source: str
    team: str | None = None  # Prime's: whose account pays

    @property
    def account(self) -> str:
        """Return what tells this key's account from another's, and nothing of the key."""
        return hashlib.sha256(f"{self.secret} {self.team or ''}".encode()).hexdigest()[:16]

    def hidden(self, text: str) -> str:
        """Return `text` without this key and those of the environment, should a provider repeat one."""
        values = (value.strip() for name, value in os.environ.items() if SECRET_NAME.search(name))
        keys = {value for value in values if len(value) >= SECRET_LENGTH_MIN} | {self.secret}
        for key in sorted(filter(None, keys), key=len, reverse=True):
            text = text.replace(key, "[key]")
        return text


@dataclass(frozen=True)
class _Place:
    variable: str
    files: tuple[str, ...]
    read: Callable[[str], str]


def _plain(text: str) -> str:
    return text


def _runpod(text: str) -> str:
    tables = tomllib.loads(text)
    tables = {**tables, **tables.get("default", {})}
    return str(tables.get("api_key") or tables.get("apikey") or tables.get("apiKey") or "")


def _lambda(text: str) -> str:
    found = re.search(r"^\s*api_key\s*=\s*(\S+)", text, re.MULTILINE)
    return found[1].strip("\"'") if found else ""


def _prime(text: str) -> str:
    return str(json.loads(text).get("api_key") or "")


PLACES: Mapping[ProviderName, _Place] = {
    "runpod": _Place("RUNPOD_API_KEY", ("~/.runpod/config.toml",), _runpod),
    "vast": _Place(
        "VAST_API_KEY", ("$XDG_CONFIG_HOME/vastai/vast_api_key", "~/.vast_api_key"), _plain
    ),
    "lambda": _Place("LAMBDA_API_KEY", ("~/.lambda_cloud/lambda_keys",), _lambda),
    "prime": _Place("PRIME_API_KEY", ("~/.prime/config.json",), _prime),
}


def read_key(provider: ProviderName) -> ProviderKey | None:
    """Return a provider's key from its variable, else its file; None if there is neither. Raises CloudError."""
    if provider == "sky":
        return _sky()
    place = PLACES[provider]
    if secret := os.environ.get(place.variable, "").strip():
        return _checked(ProviderKey(secret, f"${place.variable}", _team(provider)), provider)
    for name in place.files:
        file = _path(name)
        try:
            secret = place.read(file.read_text()).strip()
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            problem = type(error).__name__  # its text could hold a part of the key
            fix = f"write the file again with the provider's own tool, or export {place.variable}"
            raise CloudError(
                f"{file}: the key of {provider} cannot be read: {problem}.", kind="key", fix=fix
            ) from None
        if secret:
            return _checked(ProviderKey(secret, str(file), _team(provider)), provider)
    return None


def _sky() -> ProviderKey | None:
    """Return what stands for a key of SkyPilot, which keeps those of its clouds itself; None if it is not installed."""
    return ProviderKey("", "SkyPilot") if importlib.util.find_spec("sky") is not None else None


def _checked(key: ProviderKey, provider: ProviderName) -> ProviderKey:
    if re.fullmatch(r"[\x21-\x7e]+", key.secret) is None:
        needed = "one line of letters, digits and signs, without spaces"
        raise CloudError(
            f"{provider}: {key.source} does not hold an API key.", kind="key", needed=needed
        )
    return key


def _path(name: str) -> Path:
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(name.replace("$XDG_CONFIG_HOME", config)).expanduser()


def _team(provider: ProviderName) -> str | None:
    if provider != "prime":
        return None
    if team := os.environ.get("PRIME_TEAM_ID"):
        return team
    try:
        return (
            str(json.loads(_path("~/.prime/config.json").read_text()).get("team_id") or "") or None
        )
    except (OSError, ValueError, AttributeError):
        return None  # no file: the personal account


def where_keys_are(provider: ProviderName) -> str:
    """Return where a key is looked for, in words."""
    if provider == "sky":
        return "SkyPilot is not installed: pip install 'rollouts[sky]', then `sky check` for its clouds' keys"
    place = PLACES[provider]
    return f"${place.variable}, or {' or '.join(str(_path(name)) for name in place.files)}"
