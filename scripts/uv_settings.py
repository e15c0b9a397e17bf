"""Print what pip is told on this machine as uv's variables, one a line: uv does not read pip's configuration.

uv installs the environment of a checkout, and those that tests make: it unpacks a wheel once for all of them.
"""

import os
import subprocess
import sys
from collections.abc import Mapping

from rollouts.worker.environments.isolation import pip_settings

NAMES = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_NO_INDEX": "UV_NO_INDEX",
    "PIP_CERT": "SSL_CERT_FILE",
}


def uv_settings(environment: Mapping[str, str], pip_list: str) -> dict[str, str]:
    """Return uv's variables for these, and for what `pip config list` says; what is set for uv already wins."""
    told = {**pip_settings(pip_list)[0], **environment}
    settings = {uv: told[pip] for pip, uv in NAMES.items() if told.get(pip)}
    if "UV_FIND_LINKS" in settings:  # pip separates them by spaces
        settings["UV_FIND_LINKS"] = ",".join(settings["UV_FIND_LINKS"].split())
    if "UV_INDEX" in settings:  # as pip does: the best of all indexes
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {
        "UV_SYSTEM_CERTS": "1",
        "UV_NO_PROGRESS": "1",
        **settings,
        **{name: value for name, value in environment.items() if name.startswith("UV_")},
    }


def settings_of_this_machine(environment: Mapping[str, str]) -> dict[str, str]:
    """Return them for an account with this environment."""
    asked = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(asked, env=dict(environment), capture_output=True, text=True, check=True)
    return uv_settings(environment, done.stdout)


if __name__ == "__main__":
    for name, value in settings_of_this_machine(os.environ).items():
        print(f"{name}={value}")
