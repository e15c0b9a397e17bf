"""The way to a rented machine: a key of our own, and an ssh_config with the machine's pinned host key."""

import shutil
import time
from collections.abc import Callable

import anyio

from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.ledger import Lease
from rollouts.cloud.machine_ssh import key_file, public_key, ssh_config
from rollouts.cloud.machine_types import Address, Machine
from rollouts.cloud.provider import Provider
from rollouts.run_dir import machine_dir, write_text_atomic

FIRST_POLL_S, LONGEST_POLL_S = 0.5, 5.0


def own_public_key() -> str:
    """Return the public key that machines let in, made once as ~/.rollouts/cloud/id_ed25519. Raises CloudError."""
    if shutil.which("ssh-keygen") is None and not key_file().is_file():
        raise CloudError(
            "ssh-keygen is not installed.", kind="refused", fix="apt-get install openssh-client"
        )
    return public_key()


def write_ssh_config(name: str, address: Address) -> None:
    """Write how to reach a machine by its name. A host key that was pinned stays."""
    directory = machine_dir(name)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = key_file()
    if address.private_key:
        key = directory / "key"
        write_text_atomic(key, address.private_key, mode=0o600)
    at, port, user = address.host, address.port, address.user
    text = ssh_config(name, directory, host=at, port=port, user=user, key=key)
    (directory / "ssh_config").write_text(text)


async def reach(
    provider: Provider,
    lease: Lease,
    logs_in: Callable[[], str],
    *,
    timeout_s: float,
    price_max: float,
    say: Callable[[str], None],
) -> Machine:
    """Wait until a machine runs and somebody can log in; its ssh_config is written by then. Raises CloudError.

    `logs_in` tries the address of the ssh_config and returns what is wrong, or "".
    """
    assert lease.machine_id is not None, "only a machine that was made can be reached"
    deadline, pause_s, last = time.monotonic() + timeout_s, FIRST_POLL_S, "it does not show yet"
    while time.monotonic() < deadline:
        machine = await provider.get(lease.machine_id)
        if machine is not None:
            _refuse(machine, lease, price_max)
            if machine.status != last:
                say(f"{lease.name}: {machine.status}")
            last = machine.status
            for address in machine.addresses if machine.state == "ready" else ():
                write_ssh_config(lease.name, address)
                problem = await anyio.to_thread.run_sync(logs_in)
                if not problem:
                    return machine
                last = f"{machine.status}; {address.user}@{address.host}:{address.port}: {problem}"
        await anyio.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_POLL_S)
    raise CloudError(
        f"{_named(lease)} cannot be logged into after {timeout_s:.0f} s.",
        kind="no capacity",
        found=f"last: {last}",
    )


def _refuse(machine: Machine, lease: Lease, price_max: float) -> None:
    """Raise CloudError for a machine that will never run, or that costs more than it may."""
    if machine.price_per_hour is not None and machine.price_per_hour > price_max:
        found = f"${machine.price_per_hour:.2f} an hour; at most ${price_max:.2f} is allowed"
        raise CloudError(
            f"{_named(lease)} costs more than it was offered for.", kind="no capacity", found=found
        )
    if machine.state in ("broken", "preempted", "ended"):
        found = f"{machine.status} {machine.message}".strip()
        raise CloudError(
            f"{_named(lease)} will not run: {machine.state}.", kind="no capacity", found=found
        )


def _named(lease: Lease) -> str:
    return f"{lease.provider}: machine {lease.name} (${lease.price_per_hour:.2f} an hour)"
