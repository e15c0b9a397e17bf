"""Ends the machine that it runs on, at a given time or when it is idle, with the key that it has from its provider.

Standard library alone: it is sent to the machine. It answers one line of JSON, and goes on in the background.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

from rollouts.cloud.machine_use import doing
from rollouts.run_dir.layout import home_dir

VARIABLES = {"runpod": "RUNPOD_API_KEY", "vast": "CONTAINER_API_KEY"}
ASK_AGAIN_S = 60.0
LOOK_S = 30.0
TIMEOUT_S = 30.0
NOT_FOUND = 404


def scoped_key(provider: str) -> str:
    """Return the machine's own key: a login shell may lack the container's variables, its first process has them."""
    name = VARIABLES[provider]
    if os.environ.get(name):
        return os.environ[name]
    try:
        with open("/proc/1/environ", "rb") as file:
            lines = file.read().split(b"\0")
    except OSError:
        return ""
    return next(
        (
            line.partition(b"=")[2].decode()
            for line in lines
            if line.startswith(name.encode() + b"=")
        ),
        "",
    )


def ask(method: str, url: str, key: str) -> int:
    """Return the status of a call with the machine's own key; 0 where there was no answer."""
    headers = {"Authorization": f"Bearer {key}", "User-Agent": "rollouts"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=headers), timeout=TIMEOUT_S
        ) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def may_go_on(at: float, home: str, idle_s: float) -> None:
    """Return at `at`, or when nothing was done here for `idle_s` on end; 0: however idle it is.

    By the clock that nobody sets: a time of day that is set back would let the machine bill longer.
    """
    idle_since = None
    while (now := time.monotonic()) < at:
        if idle_s > 0:
            idle_since = None if _in_use(home) else now if idle_since is None else idle_since
            if idle_since is not None and now - idle_since >= idle_s:
                return
        longest = min(LOOK_S, idle_s / 4) if idle_s > 0 else LOOK_S
        time.sleep(min(longest, max(0.1, at - time.monotonic())))


def _in_use(home: str) -> bool:
    try:
        return doing(home) != ""
    except Exception:  # not known: nothing ends by what is not known
        return True


def main() -> None:
    provider, url, seconds, idle_s = sys.argv[1:5]
    key = scoped_key(provider)
    status = ask("GET", url, key) if key else 0
    if status != 200:
        problem = f"HTTP {status}" if key else f"no {VARIABLES[provider]}"
        print(json.dumps({"armed": False, "problem": problem}))
        return
    at = time.monotonic() + float(seconds)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for descriptor in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            may_go_on(at, str(home_dir().absolute()), float(idle_s))
            while ask("DELETE", url, key) != NOT_FOUND:
                time.sleep(ASK_AGAIN_S)
        os._exit(0)
    os.wait()
    print(json.dumps({"armed": True, "problem": ""}))
