"""Key-value stores of torch.distributed that listen on one address; torch's own listen on all of them.

A store has no password, and some of what uses one unpickles what it finds there.
"""

import importlib
import socket
from typing import Any, ClassVar

import torch.distributed as dist

_BACKLOG = 2048  # torch's own


def _listen_at(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


class BoundStore(dist.TCPStore):
    """TCPStore's arguments, order and meaning; what it serves is served at `host_name` alone."""

    _served: ClassVar[set[int]] = set()  # ports of this process, which `multi_tenant` shares

    def __init__(
        self,
        host_name: str,
        port: int = 0,
        world_size: int | None = None,
        is_master: bool = False,
        *more: Any,
        **named: Any,
    ) -> None:
        shared = bool(named.get("multi_tenant")) and port in self._served
        if is_master and not shared and named.get("master_listen_fd") is None:
            listening = _listen_at(host_name, port)
            port = int(listening.getsockname()[1])
            named["master_listen_fd"] = listening.detach()  # the store closes it
            self._served.add(port)
        super().__init__(host_name, port, world_size, is_master, *more, **named)


def bind_all_stores() -> None:
    """From now on, have this process's stores, those of other people's code too, listen where their clients look for
    them.

    For servers that are not ours; to be called before they are imported.
    """
    dist.TCPStore = BoundStore  # type: ignore[misc]
    # Behind a function of its name; every tcp:// and env:// store is made there
    importlib.import_module("torch.distributed.rendezvous").TCPStore = BoundStore  # type: ignore[attr-defined]
