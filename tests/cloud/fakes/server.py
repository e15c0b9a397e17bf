"""What the four stand-ins share: an HTTP server, machines with a bill, and faults that a test puts in.

A machine bills from the moment in which it was made, whatever the caller heard of it, until it is terminated.
"""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "sk-secret-of-the-test-account-0123456789"
BEFORE = ("429 plain", "429 json", "429 retry-after", "500", "lost before")  # nothing is done
LAG_S = 0.4
SLOW_S = 200.0  # until an answer that nobody waits for
# it is done, and the caller does not hear of it
AFTER = "500 after", "lost", "page after", "408 after"


@dataclass
class Answer:
    status: int
    body: Any = None  # a dict or list is JSON, a string is plain text
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    operation: str
    kind: str
    times: int


@dataclass
class FakeMachine:
    """A machine, and what it costs so far. `looks` counts how often its status was read."""

    machine_id: str
    name: str
    price_per_hour: float
    asked: dict[str, Any]  # the body of its create call
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    has_own_key: bool = True
    looks: int = 0
    ends_at: float = float("inf")  # by itself, as the create call asked
    hidden_until: float = 0.0  # reads before it do not show it yet
    fate: str = ""  # "stuck", "preempted", or a provider's own
    address: tuple[str, int, str] = ("127.0.0.1", 9, "root")

    @property
    def bills(self) -> bool:
        return self.ended is None

    @property
    def is_hidden(self) -> bool:
        return time.monotonic() < self.hidden_until


# (machine, public key) -> where SSH answers, as whom
Boot = Callable[[FakeMachine, str], tuple[str, int, str]]


MADE: list["FakeCloud"] = []  # all of this process: tests/cloud/conftest.py looks at their bills


class FakeCloud:
    """One provider with one account. Subclasses say what its paths mean and what its answers look like."""

    provider = ""
    prefix = ""

    def __init__(self) -> None:
        MADE.append(self)
        self.machines: dict[str, FakeMachine] = {}
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.faults: list[Fault] = []
        self.latency_s = 0.0
        self.key_works = True
        self.boot: Boot | None = None
        self.shut_down: Callable[[FakeMachine], None] = lambda machine: None
        self.ended_themselves: list[str] = []
        self.ended_by_provider: list[str] = []
        self.gives_own_key = True
        self.lock = threading.RLock()
        self.ids = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{self.prefix}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, operation: str, kind: str, times: int = 1) -> None:
        """Let the next `times` calls of this operation go wrong in this way."""
        self.faults.append(Fault(operation, kind, times))

    def bill(self) -> dict[str, float]:
        """The machines that cost money now, with their price."""
        self.end_what_is_due()
        return {
            machine.name: machine.price_per_hour
            for machine in list(self.machines.values())  # a thread may add one meanwhile
            if machine.bills
        }

    def named(self, name: str) -> list[FakeMachine]:
        return [machine for machine in list(self.machines.values()) if machine.name == name]

    def calls(self, method: str, part: str) -> int:
        return sum(asked == method and part in path for asked, path, _, _ in self.requests)

    # --- what subclasses say ------------------------------------------------------------------------------------------

    def operation(self, method: str, path: str) -> str:
        raise NotImplementedError

    def do(self, operation: str, path: str, query: dict[str, str], body: Any) -> Answer:
        """Do what `on_<operation>` of the provider does: offers, create, get, list, terminate, keys."""
        return getattr(self, f"on_{operation}")(path, query, body)

    def error(self, status: int, text: str) -> Answer:
        raise NotImplementedError

    def no_capacity(self) -> Answer:
        raise NotImplementedError

    # --- machines -----------------------------------------------------------------------------------------------------

    def make(
        self, name: str, price: float, asked: Any, public_key: str, machine_id: str | None = None
    ) -> FakeMachine:
        machine = FakeMachine(machine_id or f"m{next(self.ids)}", name, price, asked)
        if fault := self.take(
            "create", ("lag", "stuck", "preempted", "broken", "dearer", "closed")
        ):
            machine.fate = fault
            machine.hidden_until = time.monotonic() + LAG_S if fault == "lag" else 0.0
            machine.price_per_hour *= 3 if fault == "dearer" else 1
        machine.has_own_key = self.gives_own_key
        self.machines[machine.machine_id] = machine
        if self.boot is not None and machine.fate not in ("stuck", "broken", "closed"):
            machine.address = self.boot(machine, public_key)
        return machine

    def seen(self, machine_id: str) -> FakeMachine | None:
        """The machine, if it shows already."""
        machine = self.machines.get(machine_id)
        if machine is None or machine.is_hidden:
            return None
        machine.looks += 1
        return machine

    def shown(self) -> list[FakeMachine]:
        return [machine for machine_id in list(self.machines) if (machine := self.seen(machine_id))]

    def end_what_is_due(self) -> None:
        """End the machines that the provider was told to end at a time that has come."""
        for machine in list(self.machines.values()):
            if machine.bills and time.time() >= machine.ends_at:
                self.ended_by_provider.append(machine.machine_id)
                self.end(machine)

    def take_away(self, machine: FakeMachine) -> None:
        """Take a machine away: it ends, its status says that it is broken, and it bills until it is terminated."""
        machine.fate, machine.looks = "broken", 9
        self.shut_down(machine)

    def end(self, machine: FakeMachine) -> None:
        if machine.bills:
            machine.ended = time.monotonic()
            self.shut_down(machine)

    def take(self, operation: str, kinds: tuple[str, ...]) -> str:
        """Take the next fault of these kinds, if one is in store for the operation."""
        with self.lock:
            for fault in self.faults:
                if fault.operation == operation and fault.kind in kinds and fault.times > 0:
                    fault.times -= 1
                    return fault.kind
        return ""

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def answer(self, method: str, url: str, headers: Any, body: Any) -> Answer | None:
        """Return what to answer; None: close the connection without a word."""
        parts = urlsplit(url)
        path = unquote(parts.path).removeprefix(self.prefix)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        time.sleep(self.latency_s)
        with self.lock:
            self.requests.append((method, path, query, body))
            self.end_what_is_due()
            scoped = headers.get("Authorization", "").removeprefix("Bearer scoped-")
            # the machine's own key: for itself alone
            if scoped in self.machines and f"/{scoped}" in path:
                self.ended_themselves += [scoped] if method == "DELETE" else []
            elif headers.get("Authorization") != f"Bearer {KEY}" or not self.key_works:
                # a provider that repeats it
                return self.error(401, f"invalid key {headers.get('Authorization')}")
            operation = self.operation(method, path)
            if early := self.take(operation, (*BEFORE, "capacity")):
                return self._early(early)
            if operation == "terminate" and self.take("terminate", ("does nothing",)):
                return self.accepted()
            done = self.do(operation, path, query, body)
            late = self.take(operation, AFTER)
        if self.take(operation, ("slow",)):
            time.sleep(SLOW_S)
        answers = {
            "lost": None,
            "500 after": self.error(500, "internal error"),
            "page after": Answer(200, "<html>a proxy's page</html>"),
            "408 after": self.error(408, "timed out"),
        }
        return answers.get(late, done)

    def accepted(self) -> Answer:
        return Answer(204)

    def _early(self, kind: str) -> Answer | None:
        answers = {
            "429 plain": Answer(429, "Too many requests, slow down"),
            "429 json": self.error(429, "rate limit"),
            "429 retry-after": Answer(
                429, self.error(429, "rate limit").body, {"Retry-After": "0"}
            ),
            "500": self.error(500, "internal error"),
            "capacity": self.no_capacity(),
        }
        return answers.get(kind)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                # the caller was killed meanwhile
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.answer()

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                answer = cloud.answer(self.command, self.path, self.headers, body)
                if answer is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                is_text = isinstance(answer.body, str)
                data = (
                    answer.body.encode()
                    if is_text
                    else b""
                    if answer.body is None
                    else json.dumps(answer.body).encode()
                )
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "text/plain" if is_text else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = do_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
