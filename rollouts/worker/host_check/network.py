"""Does this host reach the package index and the model hub, and may it read the models? Within bounded seconds."""

import contextlib
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.worker.environments.fetch_uv import indexes, open_url, pip_options

PUBLIC_HUB = "https://huggingface.co"
ANSWER_TIMEOUT_S = 8.0
ALL_TIMEOUT_S = 12.0  # a name server that does not answer has no time limit of its own
UNANSWERED = f"no answer within {ALL_TIMEOUT_S:.0f} s"
REFUSALS = (407, 502, 503, 504)  # a proxy's
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
STATES = {
    "GatedRepo": "gated",
    "RepoNotFound": "missing",
    "EntryNotFound": "open",
    "RevisionNotFound": "open",
}


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the token is for the hub alone, and that a file has another place is answer enough."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class SiteQuestion:
    """One site or model, and how it is asked."""

    ask: Callable[[], dict[str, Any]]
    unanswered: dict[str, Any]  # the row of one that has no end in time


def network_row(environment: Mapping[str, str], models: Iterable[str]) -> dict[str, Any]:
    """Ask all at once: {"sites": [...], "models": [...], "offline": is the hub not to be asked?}."""
    options, hub = pip_options(), environment.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB
    offline = any(
        environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in OFFLINE_VARIABLES
    )
    sites = [
        _of_site("package index", url, f"{url}/uv/", options)
        for url in indexes(dict(environment), options)
    ]
    sites += [] if offline else [_of_site("hub", hub, hub, {})]
    token = find_token(environment)
    asked = [] if offline else [_of_model(hub, name, token) for name in models]
    rows = _all([*sites, *asked])
    return {"sites": rows[: len(sites)], "models": rows[len(sites) :], "offline": offline}


def _of_site(kind: str, url: str, page: str, options: dict[str, str]) -> SiteQuestion:
    # without the password in it
    row = {"kind": kind, "url": re.sub(r"//[^/@]*@", "//", url), "seconds": None}
    return SiteQuestion(lambda: row | _site(kind, page, options), row | {"problem": UNANSWERED})


def _of_model(hub: str, name: str, token: str) -> SiteQuestion:
    row = {"name": name, "token": bool(token)}
    return SiteQuestion(
        lambda: row | _model(hub, name, token), row | {"state": "unknown", "problem": UNANSWERED}
    )


def _all(questions: Sequence[SiteQuestion]) -> list[dict[str, Any]]:
    """Ask them side by side; one that has no end in time does not keep the program."""
    rows = [question.unanswered for question in questions]

    def ask(at: int) -> None:
        rows[at] = questions[at].ask()

    threads = [
        threading.Thread(target=ask, args=(at,), daemon=True) for at in range(len(questions))
    ]
    deadline = time.monotonic() + ALL_TIMEOUT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(rows)


def _site(kind: str, page: str, options: dict[str, str]) -> dict[str, Any]:
    """Open a page: any answer of the site itself will do, since an index need not have that package."""
    if page.startswith("file:"):
        directory = urllib.request.url2pathname(urllib.parse.urlsplit(page).path)
        there = os.path.isdir(os.path.dirname(directory.rstrip("/")))
        return (
            {"seconds": 0.0, "problem": ""} if there else {"problem": "there is no such directory"}
        )
    began = time.monotonic()
    try:
        with open_url(page, options, timeout_s=ANSWER_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in REFUSALS or (kind == "package index" and error.code in (401, 403)):
            return {"problem": f"HTTP {error.code} {error.reason}"}
    except (OSError, ValueError) as error:  # URLError is an OSError
        return {"problem": _words(error)}
    return {"seconds": round(time.monotonic() - began, 2), "problem": ""}


def _model(hub: str, name: str, token: str) -> dict[str, Any]:
    """Ask for a model's config.json, as a run does: open, gated, missing or unknown."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{hub}/{name}/resolve/main/config.json", headers=headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=ANSWER_TIMEOUT_S):
            return {"state": "open", "problem": ""}
    except urllib.error.HTTPError as error:
        error.close()
        code = error.headers.get("X-Error-Code", "")
        state = "open" if 300 <= error.code < 400 else STATES.get(code, "unknown")
        said = error.headers.get("X-Error-Message") or error.reason
        return {"state": state, "problem": "" if state == "open" else f"HTTP {error.code} {said}"}
    except (OSError, ValueError) as error:
        return {"state": "unknown", "problem": _words(error)}


def _words(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def find_token(environment: Mapping[str, str]) -> str:
    """Return the token that the hub's own client would send: a variable's, or that of a login on this host."""
    named = next((environment[name] for name in TOKEN_VARIABLES if environment.get(name)), "")
    if named:
        return named.strip()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (
            Path(os.path.expanduser(environment.get("HF_TOKEN_PATH") or f"{home}/token"))
            .read_text()
            .strip()
        )
    return ""
