"""What a page shows and what it is told of after that: nothing that happens in between is missed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from rollouts.remote.run import registry
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import RunDir, Status, append_jsonl, hold_lock, write_json_atomic
from tests.view.runs import write_run
from tests.view.ui.conftest import Ui, opened, started

PINGS_MAX = 15  # one each 10 s: a machine may be slow


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of this machine's registry, without a supervisor."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    run = write_run(tmp_path / "home/runs/a", steps=3)
    registry.registry_dir()
    registry.save(
        RunEntry(
            run_id="a", experiment_name="example", target="local", home=str(tmp_path / "home"),
            run_path=str(run.path), local_dir=str(tmp_path / "none"), repository=str(tmp_path), created_at=1.0,
        )
    )  # fmt: skip
    status = Status(
        run_id="a", experiment_name="example", state="running", stage="rl", message="step 3", started_at=1.0,
        updated_at=2.0, exit_code=None,
    )  # fmt: skip
    write_json_atomic(run.status, vars(status))
    return run


@pytest.fixture
def ui(run: RunDir, tmp_path: Path) -> Iterator[Ui]:
    ui = started(ROLLOUTS_HOME=str(tmp_path / "home"))
    yield ui
    ui.end()
    ui.process.communicate()


def events(stream: httpx.Response) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, id and data of each event that tells of a change, and of the first."""
    said: dict[str, str] = {}
    pings = 0
    for line in stream.iter_lines():
        pings += line == ": still here"
        assert pings < PINGS_MAX, "nothing was told for minutes"
        name, _, value = line.partition(": ")
        said[name] = value
        if not line and said.get("event") in ("hello", "changed"):
            yield said["event"], said.get("id", ""), json.loads(said["data"])
        said = said if line else {}


def test_a_change_before_one_listens_is_told(ui: Ui, run: RunDir) -> None:
    """Goal: what changed between the page's making and its listening is told first, as after a lost connection what
    changed since the last event; nothing else is. Red with the files as they are at the beginning to listen."""
    with hold_lock(run) or pytest.fail("held"), ui.client() as client:
        shown = client.get("/api/runs/a").json()
        assert shown["state"] == "running"
        append_jsonl(run.events, {"time": 1.0, "kind": "warning", "message": "hot"})
        told = {"told": shown["version"]}
        with client.stream("GET", "/api/runs/a/live", params=told) as stream:
            found = events(stream)
            assert next(found)[0] == "hello"
            _, version, names = next(found)
            assert names == ["events.jsonl"]
        append_jsonl(run.metrics, {"time": 2.0, "stage": "rl", "step": 4})
        again = {"last-event-id": version}
        with client.stream("GET", "/api/runs/a/live", params=told, headers=again) as stream:
            assert [names for _, (_, _, names) in zip(range(2), events(stream), strict=False)][
                1
            ] == ["metrics.jsonl"]


def test_a_death_is_told(ui: Ui, run: RunDir) -> None:
    """Goal: a supervisor that is killed changes no file, and the page that listens is told all the same."""
    lock = hold_lock(run) or pytest.fail("held")
    with ui.client() as client:
        told = {"told": client.get("/api/runs/a").json()["version"]}
        with client.stream("GET", "/api/runs/a/live", params=told) as stream:
            found = events(stream)
            assert next(found)[0] == "hello"
            lock.close()
            assert next(found)[2] == ["state"]
        assert client.get("/api/runs/a").json()["state"] == "died"


def test_a_click_outlives_a_redraw(ui: Ui, run: RunDir, browser: Browser) -> None:
    """Goal: a press whose release comes after a change of the list opens the run that was pressed. Red with the list
    drawn anew in between: the click was lost."""
    with hold_lock(run) or pytest.fail("held"), opened(browser, ui) as page:
        page.get_by_role("link", name="a", exact=True).hover()
        asked: list[Route] = []
        # the page waits for the first answer
        page.route("**/api/runs", lambda route: route.continue_() if asked else asked.append(route))
        while not asked:
            page.wait_for_timeout(50)
        status = json.loads(run.status.read_text())
        write_json_atomic(run.status, status | {"message": "step 4"})
        page.mouse.down()
        with page.expect_response("**/api/runs"):
            asked[0].continue_()
        page.evaluate("new Promise((done) => setTimeout(done, 300))")  # it is drawn, where it is
        page.mouse.up()
        expect(page).to_have_url(re.compile("/runs/a$"))
        page.go_back()
        expect(page.locator(".message").first).to_have_text("step 4")


def test_tabs_outlive_a_server(ui: Ui, run: RunDir, tmp_path: Path, browser: Browser) -> None:
    """Goal: tabs that stay open while the server ends and starts again on its port say what is so, and go on once its
    new link was opened anywhere: with all that was written meanwhile, and without the fault. An event leaves the list
    of runs as it was. Red with a lost connection that is said to be tried again and is not, and with a list whose fault
    stays until a run changes."""
    with opened(browser, ui, "/runs/a", refused=True) as page:
        page.wait_for_selector("body[data-live]")
        runs = page.context.new_page()
        runs.goto(ui.base)
        port = ui.base.rpartition(":")[2]
        assert ui.end() == 0
        expect(runs.locator("#remarks")).to_contain_text("The server does not answer")
        expect(page.locator("#gone")).to_contain_text("The connection to the server is lost")
        append_jsonl(run.events, {"time": 2.0, "kind": "warning", "message": "it is hot"})
        again = started("--port", port, ROLLOUTS_HOME=str(tmp_path / "home"))
        try:
            for place in (runs.locator("#remarks"), page.locator("#gone")):
                expect(place).to_contain_text("needs the link that `deploy ui` printed")
            page.context.new_page().goto(again.link)
            expect(page.locator("#events li").first).to_contain_text("it is hot")
            for place in (runs.locator("#remarks"), page.locator("#gone")):
                expect(place).to_be_empty()
        finally:
            again.end()
            again.process.communicate()
