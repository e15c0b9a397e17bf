"""The two passwords of a run's engines: who sets them, who reads them. Standard library only.

They are made on the host when the run is launched, kept in its 0600 secrets file, and reach engines and trainer through
these variables: no command line, plan, tmux variable, log or config has them. Other users of the host cannot read the
variables, so they can neither sample (api key) nor change weights (admin key).
"""

import hashlib
import hmac
import os
import secrets

API_KEY_VARIABLE = "ROLLOUTS_ENGINE_API_KEY"  # to sample and to ask
ADMIN_KEY_VARIABLE = (
    "ROLLOUTS_ENGINE_ADMIN_KEY"  # for weights, pauses, aborts: SGLang's `--admin-api-key`
)
OPEN_ROUTES = ("/health", "/ready", "/metrics")  # prefixes
API_ROUTES = (
    "/generate",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/version",
)
API_PREFIXES = ("/v1/", "/inference/")  # OpenAI's routes, and vLLM's of tokens


class Key(str):
    """A password that does not show where a whole record is printed: servers log their arguments when they start."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def key_for(path: str, api_key: str | None, admin_key: str | None) -> str | None:
    """Return the key that a request to `path` needs, or None. The rules are SGLang's (srt/utils/auth.py).

    Sampling and asking take the api key alone, all else the admin key alone; health needs no key.
    """
    if path.startswith(OPEN_ROUTES):
        return None
    if path in API_ROUTES or path.startswith(API_PREFIXES):
        return api_key
    return admin_key or api_key


def is_allowed(path: str, authorization: str, api_key: str | None, admin_key: str | None) -> bool:
    """Return whether a request with this Authorization header ("" for none) is allowed `path`."""
    needed = key_for(path, api_key, admin_key)
    return needed is None or secrets.compare_digest(
        authorization.encode(), f"Bearer {needed}".encode()
    )


def new_keys() -> dict[str, str]:
    """Return fresh keys, by variable."""
    return {
        API_KEY_VARIABLE: secrets.token_urlsafe(32),
        ADMIN_KEY_VARIABLE: secrets.token_urlsafe(32),
    }


def shared_keys(group_key: str) -> dict[str, str]:
    """Return the keys of a run on several hosts, by variable: each host makes the same from the run's group key."""

    def made(name: str) -> str:
        return hmac.new(group_key.encode(), name.encode(), hashlib.sha256).hexdigest()

    return {name: made(name) for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)}


def read_keys() -> tuple[Key | None, Key | None]:
    """Return (api key, admin key) of this process's environment; None for a key that is not set, as in some tests."""
    api_key, admin_key = os.environ.get(API_KEY_VARIABLE), os.environ.get(ADMIN_KEY_VARIABLE)
    return Key(api_key) if api_key else None, Key(admin_key) if admin_key else None
