"""The guards of a rented machine: armed before anything is sent to it, on this computer, on another one, and on itself.

A guard that cannot be armed is an error, unless the config allows a machine without it.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.remote.errors import DeployError
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.sending import NO_PYTHON, sent_to_any_python
from rollouts.run_dir import home_dir, machine_dir

if TYPE_CHECKING:
    from rollouts.cloud.ledger import Lease

WATCHDOGS = ("runpod", "vast")  # whose machines have a key that ends them, and nothing else
ARMED = b"armed"
ARMED_WITHIN_S = 60.0
ANSWER_TIMEOUT_S = 30.0
# on a line of its own, also below one without an end
LET_IN = 'umask 077; mkdir -p ~/.ssh && printf "\\n%s\\n" "$1" >> ~/.ssh/authorized_keys'
RENT_ALL_THE_SAME = "provision.allow_unguarded=True rents without it"


def start_guard() -> None:
    """Start a guard of this computer in the background. Raises CloudError where it does not begin to look."""
    from rollouts.cloud.cloud_errors import CloudError

    directory = home_dir() / "cloud"
    directory.mkdir(parents=True, exist_ok=True)
    ears, mouth = os.pipe()
    said, problem = b"", ""
    with os.fdopen(ears, "rb") as reads:
        try:
            _start_process(directory, mouth)
        except OSError as error:
            problem = str(error)
        finally:
            os.close(mouth)
        if select.select([reads], [], [], ARMED_WITHIN_S)[0]:
            said = reads.read(len(ARMED))
    if said != ARMED:
        raise CloudError(
            "the guard on this computer cannot be armed, and would not end the machine in time.",
            kind="unguarded",
            found=problem or f"see the end of {directory / 'guard.log'}",
            fix=f"`deploy guard` shows what is wrong; {RENT_ALL_THE_SAME}",
        )


def _start_process(directory: Path, mouth: int) -> None:
    with (directory / "guard.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-P", "-m", "rollouts.remote.guard_process", str(mouth)],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(mouth,),
        )


def post_to(host: str, lease: "Lease") -> str:
    """Hand a machine that is about to be made to the guard of another host, and return the public key of that guard.

    Raises CloudError where none holds it.
    """
    from rollouts.cloud.ledger import Ledger

    said, problem = _told(host, Ledger().intent(lease.name))
    if problem:
        raise _unguarded(host, "the guard there cannot be armed.", problem)
    return str(said["public_key"])


def let_in(host: str, lease: "Lease", guard_key: str) -> None:
    """Let the guard of another host ask a machine what it does, so that it ends an idle one. Raises CloudError."""
    cannot = f"the guard there cannot ask {lease.name} what it does."
    if not guard_key:
        raise _unguarded(host, cannot, "it could make no key: ssh-keygen is missing there")
    try:
        with contextlib.closing(open_transport(lease.name)) as transport:
            # a command and nothing else: no forwarding, no terminal
            done = transport.run(
                ["sh", "-c", LET_IN, "sh", f"restrict {guard_key}"], timeout_s=ANSWER_TIMEOUT_S
            )
        problem = done.err[-300:] if done.returncode else ""
    except DeployError as error:
        problem = error.problems[0].text()
    if not problem:
        _, problem = _told(host, _way_to(lease.name))
    if problem:
        raise _unguarded(host, cannot, problem)


def _way_to(name: str) -> dict[str, object]:
    """Return how a machine is reached, as its ssh_config here says, with its pinned host key."""
    words = (line.split() for line in (machine_dir(name) / "ssh_config").read_text().splitlines())
    said = {line[0]: line[1] for line in words if len(line) == 2}
    place = {"host": said["HostName"], "port": int(said["Port"]), "user": said["User"]}
    return {"name": name, "known_hosts": (machine_dir(name) / "known_hosts").read_text(), **place}


def _told(host: str, line: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Tell the guard of another host a line. Returns its answer, and what is wrong, or ""."""
    fields = {"armed": bool, "problem": str, "public_key": str}
    try:
        with contextlib.closing(open_transport(host)) as transport:
            argv, program = sent_to_any_python("rollouts.cloud.guard_post")
            sent = program + json.dumps(line).encode() + b"\n"
            done = transport.run(argv, stdin=sent, timeout_s=ANSWER_TIMEOUT_S)
            said = read_answer(host, "its guard", done.out, fields)
    except DeployError as error:
        return {}, error.problems[0].text()
    return said, "" if said["armed"] else f"{said['problem']} {done.err[-300:]}"


def _unguarded(host: str, message: str, found: str) -> DeployError:
    from rollouts.cloud.cloud_errors import CloudError

    return CloudError(
        f"{host}: {message}",
        kind="unguarded",
        found=found,
        needed="`deploy guard --stay` as a service there, with a key of the same account",
        fix=f"start it there; or provision.guard_host=None; {RENT_ALL_THE_SAME}",
    )


def arm_watchdog(lease: "Lease") -> None:
    """Start the watchdog on a machine. Raises CloudError where it cannot be armed."""
    from rollouts.cloud.cloud_errors import CloudError
    from rollouts.cloud.provider_api import base_url

    assert lease.until is not None and lease.machine_id is not None, "a machine with an end"
    assert lease.limits is not None, "what has an end has limits"
    path = {"runpod": "/pods/{}", "vast": "/api/v0/instances/{}/"}[lease.provider].format(
        lease.machine_id
    )
    arguments = (
        lease.provider,
        f"{base_url(lease.provider)}{path}",
        f"{max(0.0, lease.until - time.time()):.0f}",
        f"{60 * (lease.limits.idle_minutes_max or 0.0):g}",
    )
    argv, program = sent_to_any_python("rollouts.cloud.watchdog", *arguments)
    with contextlib.closing(open_transport(lease.name)) as transport:
        done = transport.run(argv, stdin=program, timeout_s=ANSWER_TIMEOUT_S)
        if done.returncode == NO_PYTHON:
            raise CloudError(f"{lease.name} has no Python 3.10 or newer.", kind="no capacity")
        said = read_answer(lease.name, "the watchdog", done.out, {"armed": bool, "problem": str})
    if not said["armed"]:
        raise CloudError(
            f"{lease.name}: the watchdog on the machine cannot be armed.",
            kind="no capacity",
            found=f"{said['problem']} {done.err[-300:]}",
            fix=RENT_ALL_THE_SAME,
        )


def use_of(lease: "Lease") -> str | None:
    """Return what a machine does, as it says itself; "" for nothing, None where it cannot be asked from here."""
    if not (machine_dir(lease.name) / "ssh_config").exists():  # nobody has logged in from here
        return None
    try:
        with contextlib.closing(open_transport(lease.name)) as transport:
            argv, program = sent_to_any_python("rollouts.cloud.machine_use")
            done = transport.run(argv, stdin=program, timeout_s=ANSWER_TIMEOUT_S)
            return str(read_answer(lease.name, "what it does", done.out, {"doing": str})["doing"])
    except DeployError:
        return None
