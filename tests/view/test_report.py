"""`deploy report` and `deploy plot`: what they write, and what a browser makes of it."""

import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair
import pandas
import pytest
from axe_core_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from scipy import stats

from rollouts.remote import report_verbs
from rollouts.remote.errors import DeployError
from rollouts.run_dir import append_jsonl
from rollouts.view import charts
from rollouts.view.run_data import read_run
from rollouts.view.usage_chart import usage_chart
from tests.view.runs import answer_row, rl_row, rollout_row, write_run

WAIT_MS = 150_000
HOSTILE = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'></script>\x1b[31m\u202e{{ 7 * 7 }}"


class Parsed(HTMLParser):
    """A page's elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] and self.elements[-1][0] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data
        else:
            self.text += data


def written(tmp_path: Path, *runs: Path) -> tuple[Path, str]:
    file = tmp_path / "report.html"
    report_verbs.report([str(run) for run in runs], output=file)
    return file, file.read_text()


def specs_of(page: str) -> dict[str, Any]:
    return json.loads(Parsed(page).scripts[0])


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    """Goal: shares, intervals, changed rows, last values and curves in the page equal those that pandas and scipy
    compute from the files. Red with RL's evaluation before its first step taken for its last."""
    run = write_run(tmp_path / "a")
    _, page = written(tmp_path, run.path)
    text = " ".join(Parsed(page).text.split())
    answers = pandas.DataFrame(
        [json.loads(line) for line in run.eval_samples.read_text().splitlines()]
    )
    last = {
        stage: answers[(answers.stage == stage) & (answers.step == step)].set_index("row").correct
        for stage, step in (("base", 0), ("sft", 40), ("rl", 40))
    }
    for stage, right in last.items():
        bounds = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        said = f"{right.sum()}/60 = {100 * right.mean():.1f} % ({100 * bounds.low:.1f} to {100 * bounds.high:.1f})"
        assert said in text, stage
    for before, after in (("base", "sft"), ("sft", "rl")):
        better, worse = (last[after] & ~last[before]).sum(), (last[before] & ~last[after]).sum()
        assert f"From {before} to {after}: {better} rows got better, {worse} got worse" in text
        change = 100 * (last[after].mean() - last[before].mean())
        assert f"{change:+.1f} (" in text and "over 60 rows" in text
    rows = pandas.DataFrame([json.loads(line) for line in run.metrics.read_text().splitlines()])
    reward = rows[rows.stage == "rl"].reward_mean
    cells = [f"{value:.5g}" for value in (reward.iloc[0], reward.iloc[-1], reward.tail(20).mean())]
    assert re.search(
        r"reward_mean</th>"
        + "".join(rf'<td class="number">{re.escape(cell)}</td>' for cell in cells),
        page,
    )
    (spec,) = (
        spec
        for spec in specs_of(page).values()
        if "reward_mean over" in spec.get("description", "")
    )
    drawn = pandas.DataFrame(spec["datasets"]["main"])
    assert list(drawn["mean"]) == pytest.approx(list(reward), rel=1e-5)
    assert list(drawn.smooth) == pytest.approx(list(reward.ewm(span=2).mean()), rel=1e-5)


def test_seeds_are_a_band_and_others_stand_alone(tmp_path: Path) -> None:
    """Goal: runs that differ in a seed alone are one line with a band of least and most; another temperature, or other
    code, is a line of its own, and what differs is listed. Red with the seed counted as a difference."""
    runs = [write_run(tmp_path / name, seed=at) for at, name in enumerate(("a", "b", "c", "d"))]
    config = json.loads(runs[2].config.read_text())
    config["rl"]["temperature"] = 0.7
    runs[2].config.write_text(json.dumps(config))
    runs[3].code_manifest.write_text(json.dumps({"digest": "feed", "files": {}}))
    _, page = written(tmp_path, *(run.path for run in runs))
    (spec,) = (
        spec
        for spec in specs_of(page).values()
        if "reward_mean over" in spec.get("description", "")
    )
    drawn = pandas.DataFrame(spec["datasets"]["main"])
    assert set(drawn.group) == {"a and 1 more seed(s)", "c", "d"}
    two = drawn[drawn.group == "a and 1 more seed(s)"]
    both = pandas.DataFrame(
        [read_run(run.path).series("rl", "reward_mean").values for run in runs[:2]]
    )
    assert list(two.low) == pytest.approx(list(both.min()), rel=1e-5)
    assert list(two.high) == pytest.approx(list(both.max()), rel=1e-5) and set(two.runs) == {2}
    text = Parsed(page).text
    assert "rl.temperature" in text and "rl.sampling.seed" in text and "code_digest" in text
    assert "last evaluations compared, over the same prompts" in text


def test_what_a_model_wrote_is_never_run(tmp_path: Path, browser: Browser) -> None:
    """Goal: HTML, a template and terminal escapes in prompts, answers, events and names of metrics are shown as they
    are; no request is made. Red with autoescape off: the image is asked for."""
    run = write_run(tmp_path / "a")
    append_jsonl(
        run.eval_samples, {**answer_row("rl", 40, 0, False), "answer": HOSTILE, "expected": HOSTILE}
    )
    append_jsonl(
        run.eval_samples, {**answer_row("sft", 40, 0, True), "prompt": {"question": HOSTILE}}
    )
    append_jsonl(
        run.rollouts,
        {**rollout_row(41, 0, random.Random(0), 4), "response": HOSTILE, "reward": 9.0},
    )
    append_jsonl(
        run.events,
        {"time": 1_790_000_111.0, "kind": "error", "message": HOSTILE, "window": HOSTILE},
    )
    append_jsonl(
        run.metrics,
        {"stage": "rl", "step": 41, "time": 1_790_000_200.0, HOSTILE: 1.0, "reward_mean": 0.9},
    )
    run.environment("trainer").write_text(f"torch=={HOSTILE}\n")
    file, text = written(tmp_path, run.path)
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31m" in text
    page, requests = browser.new_page(), []
    page.set_default_timeout(WAIT_MS)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    draw_all(page)
    assert page.evaluate("window.owned") is None
    assert requests == [file.as_uri()]
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    assert "{{ 7 * 7 }}" in page.content() and page.evaluate("document.images.length") == 0
    page.close()


def draw_all(page: Page) -> None:
    """Open all that is folded, and wait until every chart is drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_selector(".chart:not(:has(svg))", state="detached")


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (375, "dark")])
def test_a_browser_draws_it(tmp_path: Path, browser: Browser, width: int, scheme: Any) -> None:
    """Goal: every chart is drawn under the page's own policy, nothing is wider than the screen, a hover tells numbers,
    and axe finds nothing serious. Red with the policy's hash of another script."""
    runs = [write_run(tmp_path / name, seed=at, steps=12) for at, name in enumerate(("a", "b"))]
    file, _ = written(tmp_path, *(run.path for run in runs))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(WAIT_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            errors.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.goto(file.as_uri())
    draw_all(page)
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    chart.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "smoothed" in page.inner_text("#vg-tooltip-element")
    serious = [
        found
        for found in Axe().run(page)["violations"]
        if found["impact"] in ("serious", "critical")
    ]
    assert [(found["id"], found["nodes"][0]["html"]) for found in serious] == []
    page.close()


def test_it_stays_small(tmp_path: Path) -> None:
    """Goal: ten runs of 3,000 steps and long answers make no page of more than 3 MB. Red with every point drawn."""
    run, draw = write_run(tmp_path / "0", steps=20), random.Random(0)
    append_jsonl(run.metrics, *(rl_row(step, 3000, 0.5, draw) for step in range(21, 3001)))
    append_jsonl(
        run.eval_samples,
        *({**answer_row("rl", 20, row, False), "answer": "x" * 9_000} for row in range(60)),
    )
    names = [run.path]
    for at in range(1, 10):
        names.append(tmp_path / str(at))
        names[-1].mkdir()
        for file in run.path.iterdir():
            (names[-1] / file.name).symlink_to(file)
    _, page = written(tmp_path, *names)
    assert len(page.encode()) <= 3_000_000


def test_an_early_or_damaged_run_has_a_page(tmp_path: Path, browser: Browser) -> None:
    """Goal: a run without any number, and one with damaged lines, are shown with what is known, and with what was
    left out. Red with damaged rows, or damaged samples, that are not counted."""
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.json").write_text("{}")
    run = write_run(tmp_path / "a", steps=2)
    run.metrics.write_text(run.metrics.read_text() + "torn\n")
    run.rollouts.write_text(run.rollouts.read_text() + "torn\n")
    file, text = written(tmp_path, early, run.path)
    said = Parsed(text).text
    assert (
        "1 line(s) of metrics.jsonl are damaged" in said
        and "1 line(s) of rollouts.jsonl are damaged" in said
    )
    assert "the config of early cannot be read by this version" in said
    page = browser.new_page()
    page.goto(file.as_uri())
    draw_all(page)
    page.close()


def test_specs_are_what_altair_allows(tmp_path: Path) -> None:
    """Goal: every chart fits Vega-Lite's schema, which is not checked when a page is made. Red with mark "lines"."""
    run = read_run(write_run(tmp_path / "a", steps=4).path)
    made = [
        charts.curve_chart([charts.RunGroup("a", (run,))], "rl", "loss"),
        charts.length_chart([(1, 2, 0.5)]),
    ]
    for spec in (*made, charts.time_chart(run, "rl"), charts.timeline_chart(run)):
        assert spec is not None
        altair.Chart.from_dict(spec)


# --- plot -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_a_picture(tmp_path: Path, kind: str) -> None:
    """Goal: a picture of the kind that its name says, with the metric's name in it. Red with a PNG in a .svg."""
    run = write_run(tmp_path / "a", steps=5)
    file = tmp_path / f"x.{kind}"
    answer = report_verbs.plot([str(run.path)], metric="loss", stage=None, output=file)
    assert answer.document["stage"] == "rl"  # the last stage that logged it
    content = file.read_bytes()
    assert (
        content.startswith(b"\x89PNG")
        if kind == "png"
        else b"<svg" in content and b"loss" in content
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "rewards"}, "logged 'rewards'"),
        ({"metric": "entropy", "stage": "sft"}, "in stage sft"),
        ({"output": Path("x.gif")}, "needs to end with .png or .svg"),
        ({"output": Path("/proc/none/x.png")}, "cannot be written"),
    ],
)
def test_plot_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """Goal: a metric that no step logged lists those that are; a file that cannot be is named. Red with an empty
    picture."""
    run = write_run(tmp_path / "a", steps=5)
    options: dict[str, Any] = {
        "metric": "loss",
        "stage": None,
        "output": tmp_path / "x.svg",
        **change,
    }
    with pytest.raises(DeployError) as caught:
        report_verbs.plot([str(run.path)], **options)
    assert said in caught.value.text() and not (tmp_path / "x.svg").exists()


def test_a_directory_that_is_no_run_is_said(tmp_path: Path) -> None:
    """Goal: the message names the directory and how results come here. Red with a traceback."""
    with pytest.raises(DeployError, match="not a run") as caught:
        report_verbs.report([str(tmp_path)], output=None)
    assert "deploy pull RUN" in caught.value.text()


def test_a_missing_extra_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: without altair the command to install it is printed. Red with ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(DeployError, match="altair is not installed") as caught:
        report_verbs.report(
            [str(write_run(tmp_path / "a", steps=2).path)], output=tmp_path / "r.html"
        )
    assert "rollouts[view]" in caught.value.text()


def test_how_busy_the_machine_was(tmp_path: Path) -> None:
    """Goal: a line a GPU, with how much it idled in the title; a run without GPUs has its processes' CPU. Red with the
    idle share of all GPUs together, and with a chart of GPUs alone."""
    run = write_run(tmp_path / "a")
    gpus = [
        {"gpu": 0, "processes": ["trainer-0"], "use": 0.9, "memory_gib": 60.0},
        {"gpu": 1, "processes": ["engine-0"], "use": 0.25, "memory_gib": 70.0},
    ]
    process = {"name": "trainer-0", "cpu": 1.5, "memory_gib": 2.0}
    for second in range(50):
        at = {"time": 1_790_000_100.0 + second, "stage": "rl"}
        append_jsonl(run.gpu, {**at, "gpus": gpus, "processes": [process]})
    append_jsonl(run.gpu, {"time": 1.0, "stage": "rl", "gpus": [{"gpu": "x"}], "processes": []})
    _, page = written(tmp_path, run.path)
    text = " ".join(Parsed(page).text.split())
    assert "GPU 0 (trainer-0) idle 10%, GPU 1 (engine-0) idle 75%" in text
    assert "1 line(s) of gpu.jsonl are damaged" in text
    rows = next(s["datasets"]["usage"] for s in specs_of(page).values() if "usage" in s["datasets"])
    assert {(row["name"], row["use"]) for row in rows} == {
        ("GPU 0: trainer-0", 0.9),
        ("GPU 1: engine-0", 0.25),
    }
    bare = write_run(tmp_path / "b")
    append_jsonl(bare.gpu, {**at, "gpus": [], "processes": [process]})
    spec = usage_chart(read_run(bare.path))
    assert spec is not None and spec["datasets"]["usage"][0]["use"] == 1.5
