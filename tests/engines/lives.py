"""Embedded engines that are killed and started again on their port, in the time that a fork takes."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rollouts.engines.keys import API_KEY_VARIABLE
from tests.ports import free_port
from tests.training.process_nursery import shared

WAIT_S = 200.0


class Server:
    """An embedded engine on a port of its own that can be killed and started again; `keys`: its variables."""

    def __init__(
        self,
        model: Path,
        logs: Path,
        *,
        port: int | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.model, self._logs, self._keys = port or free_port(), model, logs, keys
        self._headers = {"Authorization": f"Bearer {keys[API_KEY_VARIABLE]}"} if keys else {}
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid = 0
        self.start()
        self.await_health()

    def start(self) -> None:
        flags = ["--model-path", str(self.model), "--port", str(self.port)]
        log = self._logs / f"{self.port}.log"
        self.pid = shared().start("rollouts.engines.embedded", flags, log, environment=self._keys)

    def kill(self) -> None:
        shared().kill(self.pid)
        self.pid = 0

    def close(self) -> None:
        if self.pid:
            self.kill()

    def await_end(self) -> None:
        shared().wait(self.pid)
        self.pid = 0

    def replace(self) -> None:
        self.kill()
        self.start()

    def await_health(self) -> None:
        wait_for(lambda: self.get("/health") is not None)

    def get(self, path: str) -> Any:
        try:
            answer = httpx.get(self.url + path, headers=self._headers, timeout=60)
        except httpx.TransportError:
            return None
        return answer if answer.status_code == 200 else None

    def version(self) -> str:
        return str(self.get("/model_info").json()["weight_version"])

    def running(self) -> int:
        return int(self.get("/server_info").json()["internal_states"][0]["running"])


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


@contextmanager
def meanwhile(function: Callable[[], Any]) -> Iterator[None]:
    thread = threading.Thread(target=function)
    thread.start()
    yield
    thread.join(WAIT_S)
