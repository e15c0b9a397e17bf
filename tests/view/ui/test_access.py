"""Who is served: a browser on this machine with the token, and nobody else. How the server begins and ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rollouts.remote import ui_verb
from rollouts.remote.errors import DeployError
from rollouts.view.screen import Screen
from rollouts.view.ui.serving import PORT, PORTS_TRIED, PortInUseError, listen
from tests.docs_blocks import ROOT
from tests.remote.hosts import wait_for
from tests.view.runs import write_run
from tests.view.ui.conftest import WAIT_MS, Ui, started

ESTABLISHED, CLOSED_BY_THE_CLIENT = "01", "08"  # /proc/net/tcp's words
PATHS = (
    "/",
    "/runs/a",
    "/api/runs",
    "/api/runs/a/live",
    "/static/base.css",
    "/static/vega.js",
    "/nothing",
)


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., Ui]) -> Ui:
    return serve(write_run(tmp_path_factory.mktemp("runs") / "a", steps=3).path)


def test_nothing_is_served_without_the_token(ui: Ui) -> None:
    """Goal: another user of the machine gets 403 for every address, static files and streams too; so does a wrong
    token, a wrong cookie, and the right token where its cookie should be."""
    token = ui.link.partition("token=")[2]
    name = f"rollouts_ui_{httpx.URL(ui.base).port}"
    with ui.stranger() as other:
        for path in PATHS:
            assert other.get(path).status_code == 403, path
        for bad in (token[:-1], token + "x", "", "é"):
            answer = other.get("/", params={"token": bad})
            assert answer.status_code == 403 and "set-cookie" not in answer.headers
        for cookie in (token, "x", ""):
            assert other.get("/", headers={"cookie": f"{name}={cookie}"}).status_code == 403
        assert other.post(f"/?token={token}", headers={"origin": ui.base}).status_code == 403


def test_the_token_becomes_a_cookie(ui: Ui) -> None:
    """Goal: the link leads to the same address without the token, with a cookie that scripts and other sites never
    get; the cookie is not the token."""
    token = ui.link.partition("token=")[2]
    with ui.stranger() as client:
        answer = client.get(f"/runs/a?token={token}&x=1")
        assert (answer.status_code, answer.headers["location"]) == (303, "/runs/a?x=1")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and token not in cookie
        assert client.get("/runs/a").status_code == 200
        assert (
            client.get(f"{ui.base}//example.org/?token={token}").headers["location"]
            == "/example.org/"
        )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("LOCALHOST:9", 200),
        ("[::1]:80", 200),
        ("example.org", 403),
        ("127.0.0.1.example.org:80", 403),
        ("localhost.example.org", 403),
        ("10.0.0.1", 403),
        ("", 403),
    ],
)
def test_a_site_cannot_name_itself_this_machine(ui: Ui, host: str, status: int) -> None:
    """Goal: with the cookie too, a request whose Host is another name is refused (DNS rebinding); a forwarded port is
    let pass."""
    with ui.client() as client:
        assert client.get("/", headers={"host": host}).status_code == status


def test_another_site_changes_nothing(ui: Ui) -> None:
    """Goal: a request that could change something needs our own Origin."""
    with ui.client() as client:
        for origin in ("http://example.org", "null", "http://127.0.0.1:1", None):
            headers = {"origin": origin} if origin else {}
            assert client.post("/api/runs", headers=headers).status_code == 403
        assert client.post("/api/runs", headers={"origin": ui.base}).status_code == 405


def test_every_answer_has_the_policy(ui: Ui) -> None:
    """Goal: no answer lets a script in a page run, or a page be framed or guessed; refused ones too."""
    with ui.client() as client:
        for path in ("/", "/api/runs", "/static/base.css", "/nothing", "/runs/none"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy, path
            assert (
                "frame-ancestors 'none'" in policy
                and headers["x-content-type-options"] == "nosniff"
            )
        with ui.stranger() as other:
            assert "content-security-policy" in other.get("/").headers
        for name in ("../app.py", "%2e%2e%2fapp.py", "app.py", "..%2f..%2f..%2fpyproject.toml"):
            assert client.get(f"/static/{name}").status_code == 404, name


def test_it_listens_on_this_machine_alone(ui: Ui) -> None:
    """Goal: no other machine reaches the port."""
    port = httpx.URL(ui.base).port
    assert port is not None
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
    assert [at for at in listening if at.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_a_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: without --port the next free one is taken; with it, one message names it and what to do."""
    with listen(None) as first:
        port = first.getsockname()[1]
        assert PORT <= port < PORT + PORTS_TRIED
        with pytest.raises(DeployError) as caught:
            ui_verb.ui((), Screen(as_json=True), remote=None, port=port)
        assert f"port {port}: Address already in use" in caught.value.text(launching=False)
        assert "another --port" in caught.value.text(launching=False)
        monkeypatch.setattr("rollouts.view.ui.serving.PORT", port)  # others come and go below it
        with listen(None) as second:
            assert port < second.getsockname()[1] < port + PORTS_TRIED
        monkeypatch.setattr("rollouts.view.ui.serving.PORTS_TRIED", 1)
        with pytest.raises(PortInUseError, match="are in use"):
            listen(None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_a_stream_open(tmp_path: Path, number: signal.Signals) -> None:
    """Goal: Ctrl-C and SIGTERM end the server while a browser follows a run: exit code 0, nothing printed."""
    ui = started(str(write_run(tmp_path / "a", steps=3).path))
    followed = threading.Event()

    def follow() -> None:
        with ui.client() as client, client.stream("GET", "/api/runs/a/live") as stream:
            for _ in stream.iter_lines():
                followed.set()

    reader = threading.Thread(target=follow)
    reader.start()
    assert followed.wait(WAIT_MS / 1000)
    ui.process.send_signal(number)
    out, error = ui.process.communicate(timeout=WAIT_MS / 1000)
    reader.join(WAIT_MS / 1000)
    assert (ui.process.returncode, out, error) == (0, "", "")


def test_a_browser_that_goes_away_is_noticed(ui: Ui) -> None:
    """Goal: streams whose reader has gone end; nothing is kept open."""

    def kept(clients: set[int]) -> set[int]:
        """Of these clients' ports, those whose connection the server keeps: it has sockets of other tests too."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ends = [[int(end.rpartition(":")[2], 16) for end in line[1:3]] for line in lines]
        states = [line[3] for line in lines]
        held = {far for (near, far), state in zip(ends, states, strict=True)
                if near == httpx.URL(ui.base).port and state in (ESTABLISHED, CLOSED_BY_THE_CLIENT)}  # fmt: skip
        return clients & held

    ports = set()
    with contextlib.ExitStack() as open_now:
        for _ in range(5):
            client = open_now.enter_context(ui.client())
            stream = open_now.enter_context(client.stream("GET", "/api/runs/a/live"))
            ports.add(stream.extensions["network_stream"].get_extra_info("client_addr")[1])
        assert len(ports) == 5 and kept(ports) == ports
    wait_for(lambda: not kept(ports), "streams end")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}"], "not a run"),
        (["{tmp}/none"], "no such directory"),
        (["{tmp}", "--remote", "host"], "--remote shows the runs of that host"),
    ],
)
def test_what_cannot_be_shown_is_said(tmp_path: Path, arguments: list[str], said: str) -> None:
    """Goal: a directory that is no run ends the command with one message, code 2."""
    words = [word.format(tmp=tmp_path) for word in arguments]
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy.py"), "ui", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_MS / 1000,
    )
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "numpy", "jinja2", "altair"])
def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Goal: without a package of the extra its name and how to install it are said."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeployError, match=f"{name} is not installed") as caught:
        ui_verb.ui((), Screen(as_json=True), remote=None, port=None)
    assert "rollouts[view]" in caught.value.text(launching=False)


def test_people_are_told_the_link(tmp_path: Path) -> None:
    """Goal: on a terminal without a display the link is printed, and how to end it; no browser is started."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\ntouch {opened}\n")
    browser.chmod(0o755)
    environment: dict[str, Any] = {**os.environ, "BROWSER": str(browser)}
    environment.pop("DISPLAY", None)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "deploy.py"), "ui"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("this machine: http://127.0.0.1:") and "?token=" in first
    assert "Ctrl-C" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_MS / 1000) == 0 and not opened.exists()
