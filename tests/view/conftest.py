"""A browser, once for all pages that are looked at."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


# its event loop runs until it is closed: no test of asyncio could run beside it
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's own chromium, headless; `scripts/setup dev` installs it."""
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if program is None:
        pytest.fail("no chromium on this machine: run `scripts/setup dev`, or name one in CHROMIUM")
    with sync_playwright() as play:
        started = play.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-dev-shm-usage"],
            timeout=200_000,
        )
        yield started
        started.close()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollouts home of the tests' own, one for all: charts' JavaScript is bundled once."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path_factory.getbasetemp() / "view_home"))
