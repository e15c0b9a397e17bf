"""The command as a process of its own, and a browser that notes every request."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.docs_blocks import ROOT
from tests.ports import free_port
from tests.remote.conftest import laptop, project, shared

__all__ = ["laptop", "project", "shared"]
WAIT_MS = 150_000  # of a page, for what takes a second where nothing else runs
expect.set_options(timeout=WAIT_MS)


@dataclass
class Ui:
    """A running `deploy ui`."""

    process: "subprocess.Popen[str]"
    link: str
    base: str = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.link.partition("/?")[0]

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Open a client that has come in by the link."""
        with httpx.Client(base_url=self.base, timeout=WAIT_MS / 1000, trust_env=False) as client:
            assert client.get(self.link).status_code == 303
            yield client

    def stranger(self) -> httpx.Client:
        """Return a client that knows the address alone."""
        return httpx.Client(base_url=self.base, timeout=WAIT_MS / 1000, trust_env=False)

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT_MS / 1000)


def started(*arguments: str, cwd: Path | None = None, **variables: str) -> Ui:
    """Start the command, at a port that no other test has; AssertionError with what it said where it does not serve."""
    if "--port" not in arguments:
        arguments = (*arguments, "--port", str(free_port()))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "deploy.py"), "ui", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **variables},
    )
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return Ui(process, json.loads(line)["link"])


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ui]]:
    """Start servers that end with the module, in the home of these tests."""
    running: list[Ui] = []
    home = str(tmp_path_factory.getbasetemp() / "view_home")

    def start(*arguments: str | Path, cwd: Path | None = None) -> Ui:
        running.append(started(*map(str, arguments), cwd=cwd, ROLLOUTS_HOME=home))
        return running[-1]

    yield start
    for ui in running:
        if ui.process.poll() is None:
            ui.process.kill()
        ui.process.communicate()


@contextlib.contextmanager
def opened(
    browser: Browser, ui: Ui, path: str = "/", *, refused: bool = False, **options: object
) -> Iterator[Page]:
    """Open a page that came in by the link. At the end: no error in it, and no request left the machine.

    `refused`: the server may refuse what it asks for, which a browser notes as an error.
    """
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})  # type: ignore[arg-type]
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    hosts: set[str] = set()
    errors: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.goto(ui.link)
    page.goto(f"{ui.base}{path}")
    yield page
    context.close()
    assert hosts <= {urlsplit(ui.base).netloc}
    assert [text for text in errors if not (refused and "Failed to load resource" in text)] == []
