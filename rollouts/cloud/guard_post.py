"""Hands a machine to the guard of another host, run on that host: the standard library and the run directory alone.

One line of JSON comes in. First the machine's intent: it is written to the ledger there, if a guard that stays holds
the account that pays for it. Later the way to the machine, once it lets the guard's own key in. One line of JSON goes
out: whether it is guarded, and that key.
"""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rollouts.cloud.machine_ssh import key_file, public_key, ssh_config
from rollouts.run_dir.files import append_jsonl, write_text_atomic
from rollouts.run_dir.layout import home_dir, machine_dir

LOGIN_S = 20  # for a login from here to a machine
STAYS = "guard.stay"  # locked by the guard that stays; it holds {provider: account}


def accounts_guarded(cloud: Path) -> dict[str, str] | None:
    """Return the accounts that the guard of this host holds, by provider; None where no guard stays here."""
    try:
        with (cloud / STAYS).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found = json.loads(file.read())
                return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        pass
    return None


def take(line: dict[str, Any], cloud: Path) -> str:
    """Write a machine's intent into the ledger here. Returns why that would guard nothing, or ""."""
    accounts = accounts_guarded(cloud)
    if accounts is None:
        return "no `deploy guard --stay` runs there"
    if line["provider"] not in accounts:
        return f"its guard has no key of {line['provider']}"
    if accounts[line["provider"]] != line["account"]:
        return f"its key of {line['provider']} is of another account"
    append_jsonl(cloud / "ledger.jsonl", {**line, "time": time.time()})
    return ""


def own_key() -> str:
    """Return the public key by which the guard here would ask a machine what it does; "" where none can be made."""
    try:
        return public_key()
    except (OSError, subprocess.SubprocessError):
        return ""


def know_way(way: dict[str, Any]) -> str:
    """Write down how to reach a machine that lets this computer's key in: the guard here asks it what it does.

    Returns why it cannot be asked, or "".
    """
    name = way["name"]
    directory = machine_dir(name).absolute()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    (directory / "known_hosts").write_text(way["known_hosts"])
    place = {part: way[part] for part in ("host", "port", "user")}
    tried = directory / "ssh_config.tried"
    write_text_atomic(tried, ssh_config(name, directory, key=key_file(), **place), mode=0o600)
    options = ["-F", str(tried), "-o", "BatchMode=yes", "-o", f"ConnectTimeout={LOGIN_S // 2}"]
    command = ["ssh", *options, name, "true"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=LOGIN_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"ssh there: {error}"
    if done.returncode == 0:
        tried.replace(directory / "ssh_config")
    return "" if done.returncode == 0 else f"ssh there: {done.stderr.strip()[-300:]}"


def main() -> None:
    cloud = home_dir().absolute() / "cloud"
    line = json.loads(sys.stdin.buffer.readline())
    problem = know_way(line) if "known_hosts" in line else take(line, cloud)
    print(json.dumps({"armed": problem == "", "problem": problem, "public_key": own_key()}))
