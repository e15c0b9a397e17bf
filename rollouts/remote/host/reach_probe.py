"""Which of a machine's addresses do other machines reach? Sent as source to hosts that are to train together.

`listen` waits at all addresses until its stdin ends; `call` tries those of other machines. Standard library only.
"""

import contextlib
import fcntl
import json
import random
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

SIOCGIFADDR = 0x8915  # netdevice(7)
# below those that Linux gives to outgoing connections
PORTS_FROM, PORTS_BEFORE, PORT_TRIES = 20_000, 32_000, 200
CONNECT_S = 3.0  # the kernels do that, however busy their hosts are
ANSWER_S = 20.0  # a loaded host is slow, not gone
ALIVE_S = 5.0


def own_addresses() -> list[tuple[str, str]]:
    """Return (interface, address) of this machine: IPv4 first, then global IPv6 ones; none of loopback."""
    found = []
    for _, name in socket.if_nameindex():
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
            contextlib.suppress(OSError),
        ):
            answer = fcntl.ioctl(
                asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
            )
            found.append((name, socket.inet_ntoa(answer[20:24])))
    with contextlib.suppress(OSError):  # no IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope == "00":
                found.append((name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))))
    return [(name, address) for name, address in found if not address.startswith("127.")]


def listen(question: dict[str, Any]) -> None:
    """Print what this machine listens on: {"listening": [{"interface", "address", "ports"}]}, the same ports at each of
    its addresses; answer callers until stdin ends. `question`: {"token", "count", "ports", "address" or null}: so many
    ports are chosen, and those in "ports" come after them."""
    wanted = question["address"]
    places = [(name, address) for name, address in own_addresses() if wanted in (None, address)]
    sockets, ports = _bind(places, question["count"], question["ports"])
    for listening in sockets:
        threading.Thread(target=_answer, args=(listening, question["token"]), daemon=True).start()
    rows = [{"interface": name, "address": address, "ports": ports} for name, address in places]
    print(json.dumps({"listening": rows}), flush=True)
    threading.Thread(target=_stay_alive, daemon=True).start()
    while sys.stdin.readline():
        pass


def _bind(
    places: list[tuple[str, str]], count: int, fixed: list[int]
) -> tuple[list[socket.socket], list[int]]:
    """Return sockets that listen at all places on `count` free ports and on the `fixed` ones, and all these ports."""
    for _ in range(PORT_TRIES):
        free = [port for port in range(PORTS_FROM, PORTS_BEFORE) if port not in fixed]
        ports = random.sample(free, count) + fixed
        sockets: list[socket.socket] = []
        try:
            for _, address in places:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                sockets += [socket.create_server((address, port), family=family) for port in ports]
            return sockets, ports
        except OSError:
            for listening in sockets:
                listening.close()
    also = f", and {', '.join(map(str, fixed))}," if fixed else ""
    raise SystemExit(f"no {count} free ports{also} were found")


def _answer(listening: socket.socket, token: str) -> None:
    while True:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(f"{token} {time.time()}\n".encode())


def _stay_alive() -> None:
    while True:
        time.sleep(ALIVE_S)
        print(json.dumps({"alive": True}), flush=True)


def call(question: dict[str, Any]) -> None:
    """Print {"reached": [[address, port, clock difference in seconds]]} of {"token", "places": [[address, port]]}."""
    found: list[list[Any]] = []
    threads = [
        threading.Thread(target=_try, args=(address, port, question["token"], found))
        for address, port in question["places"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n" + json.dumps({"reached": found}), flush=True)


def _try(address: str, port: int, token: str, found: list[list[Any]]) -> None:
    """Add a place that answers with the token: another machine of the same address has another one.

    Its clock was read between two readings of this one: the difference is the least that fits.
    """
    with contextlib.suppress(OSError, ValueError):
        started = time.time()
        with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            said, _, their_time = connection.recv(256).decode().partition(" ")
        ended = time.time()
        if said == token:
            least, most = float(their_time) - ended, float(their_time) - started
            found.append([address, port, min(max(least, 0.0), most)])


def main() -> None:
    question = json.loads(sys.argv[2])
    listen(question) if sys.argv[1] == "listen" else call(question)
