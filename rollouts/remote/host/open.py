"""Open a transport to the host that a run takes place on."""

from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.transport import LOCAL_TARGET, Transport, parse_target


def open_transport(target: str | None, *, accept_new_host_key: bool = False) -> Transport:
    """Return the transport for `--remote target`; this machine's for None. Nothing is connected yet."""
    if target is None or target == LOCAL_TARGET:
        return LocalTransport()
    # paramiko is slow to import: only who goes remote pays
    from rollouts.remote.host.remote_host import RemoteTransport

    return RemoteTransport(target, parse_target(target), accept_new_host_key=accept_new_host_key)
