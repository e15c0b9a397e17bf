"""A run that is started from the page: the real command, the real worker, a stand-in for the trainer alone."""

from playwright.sync_api import Browser, expect

from rollouts.config.source import commented_source
from rollouts.run_dir import RunDir, read_jsonl
from tests.remote.hosts import Laptop, config_with
from tests.remote.test_whole_runs import quiet
from tests.view.ui.conftest import opened, started


def test_the_page_starts_what_it_planned(laptop: Laptop, browser: Browser) -> None:
    """Goal: a changed config is written, its plan is shown and nothing has started by then; "Start it" starts that
    config, the run is in the list, and its page follows it to the end. Red with the plan alone run again, and with the
    `rollouts` of the working directory run in place of the server's."""
    text = commented_source(config_with({}), "A job of this repository.")
    (laptop.project / "job.py").write_text(text)
    ui = started(
        cwd=laptop.project,
        HOME=str(laptop.home),
        ROLLOUTS_HOME=str(laptop.rollouts_home),
        TMUX_TMPDIR=str(laptop.tmux_dir),
    )
    runs = laptop.rollouts_home / "runs"
    try:
        with opened(browser, ui, "/build?base=job.py") as page:
            page.get_by_label("rl.num_samples", exact=True).fill("6")
            expect(page.locator("#differences")).to_contain_text("rl.num_samples")
            expect(page.locator("#problems")).to_contain_text("This config can run.")
            page.fill("#file", "made.py")
            page.get_by_role("button", name="Write").click()
            page.get_by_role("button", name="Show the plan").click()
            start = page.get_by_role("button", name="Start it on this machine")
            expect(start).to_be_visible()
            assert "(nothing is touched)" in page.locator("#said").inner_text()
            assert not runs.exists() or list(runs.iterdir()) == [], "the plan starts nothing"
            start.click()
            expect(page.locator("#written a")).to_have_text("All runs")
            page.locator("#written a").click()
            expect(page.locator(".runs tbody tr")).to_have_count(1)
            page.locator(".runs tbody th a").click()
            expect(page.locator("#heading .badge")).to_have_text("done")
            run_id = page.locator("h1").inner_text()
    finally:
        ui.end()
    quiet(run_id)
    run = RunDir(runs / run_id)
    assert '"num_samples": 6' in run.config.read_text()
    assert len([row for row in read_jsonl(run.metrics) if row["stage"] == "rl"]) == 3
