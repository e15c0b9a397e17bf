"""The pages in a browser: what each shows, its keys and links, and that nothing in a run's files is ever executed."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, Page, expect

from rollouts.run_dir import RunDir, append_jsonl
from tests.view.runs import START, eval_row, rl_row, rollout_row, write_run
from tests.view.test_report import HOSTILE
from tests.view.ui.conftest import Ui, opened

TINY = Path(__file__).parents[3] / "configs/models/tiny_qwen2/tokenizer.json"


# of what axe finds only violations are told: the places that are well are thousands on a page of charts
SERIOUS = """() => axe.run({resultTypes: ["violations"]}).then((found) => found.violations
    .filter((rule) => ["serious", "critical"].includes(rule.impact)).map((rule) => [rule.id, rule.nodes[0].html]))"""
# what is announced stays for seconds alone
KEEP_ANNOUNCED = """() => { const place = document.getElementById("announce"); window.announced = [];
    new MutationObserver(() => window.announced.push(place.textContent)).observe(place, { childList: true }); }"""
TAB_STOPS = 40
STOP = """() => { const at = document.activeElement, style = getComputedStyle(at), box = at.getBoundingClientRect();
    return at === document.body ? null : {
        html: at.outerHTML.slice(0, 200), ring: style.outlineStyle !== "none" && style.outlineWidth !== "0px",
        name: at.getAttribute("aria-label") || at.innerText || at.labels?.[0]?.innerText || at.placeholder,
        seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
    }; }"""
SCROLL = """async () => { for (const chart of document.querySelectorAll(".chart")) {
    chart.scrollIntoView({ block: "center" });
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
} }"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind: two that end well, one with odd texts, one that has just begun, one that is damaged."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second", "live")):
        run = write_run(root / name, seed=seed)
        (run.path / "logs").mkdir()
        run.log("trainer").write_text("step 1\nstep 2\n")
        run.log("engine-0").write_text("engine is ready\n")
    conversation(RunDir(root / "first"))
    hostile(write_run(root / "hostile", steps=3))
    (root / "early").mkdir()
    (root / "early" / "config.json").write_text("{}")
    damaged = write_run(root / "damaged", steps=2)
    for file in (damaged.metrics, damaged.rollouts, damaged.events):
        file.write_text(file.read_text() + "torn\n")
    damaged.config.write_text("{")
    return root


def conversation(run: RunDir) -> None:
    """Add a step with an agent's episode, with thoughts and tools, in a group without contrast; its tokens decode."""
    shutil.copytree(TINY.parent, run.checkpoints / "rl/step_000040")
    row = rollout_row(41, 0, random.Random(0), 4) | {"prompt_id": "agent", "reward": 0.5}
    messages = [
        {"role": "system", "content": "You may use tools."},
        {"role": "user", "content": "What is 2+2?"},
        {
            "role": "assistant",
            "content": "<think>I need a sum.</think>Let me see.",
            "tool_calls": [{"name": "add"}],
        },
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    tokens = [11, 12, 13, 14, 15, 16]
    row |= {
        "tokens": [1, 2, *tokens],
        "response_length": 6,
        "loss_mask": [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0],
    }
    row |= {"rollout_log_probs": [-0.01, -0.2, -1.0, -2.0, -5.0, -0.01], "advantage": 0.8}
    row |= {"trainer_log_probs": [-0.01, -0.215, None, None, -3.0, -0.07]}
    append_jsonl(
        run.rollouts,
        row | {"metadata": {"messages": messages, "turns": 2}},
        row | {"response": "It is 5."},
    )


def hostile(run: RunDir) -> None:
    row = rollout_row(9, 0, random.Random(0), 4)
    odd = {
        "response": HOSTILE,
        "finish_reason": HOSTILE,
        "prompt": {"question": HOSTILE},
        "prompt_id": HOSTILE,
    }
    append_jsonl(
        run.rollouts,
        row
        | odd
        | {"metadata": {HOSTILE: HOSTILE, "messages": [{"role": HOSTILE, "content": HOSTILE}]}},
    )
    append_jsonl(
        run.events, {"time": START + 200, "kind": "error", "message": HOSTILE, "log_tail": HOSTILE}
    )
    append_jsonl(run.metrics, {"stage": HOSTILE, "step": 1, "time": START, HOSTILE: 1.0})
    append_jsonl(run.eval, eval_row("rl", 9, HOSTILE, 1.0))
    (run.path / "logs").mkdir()
    run.log("trainer").write_text(HOSTILE + "\n\x1b[31mred\x1b[0m\n10%\r50%\rwhole\n")
    config = json.loads(run.config.read_text())
    run.config.write_text(json.dumps(config | {HOSTILE: HOSTILE}))


@pytest.fixture(scope="module")
def ui(runs: Path, serve: Callable[..., Ui]) -> Ui:
    return serve(
        *(runs / name for name in ("first", "second", "live", "hostile", "early", "damaged"))
    )


def walk(page: Page, key: str) -> str:
    """Press j or k, and wait until another sample is shown and the address has it. Returns that sample."""
    before = page.evaluate("() => document.body.dataset.sample")
    page.keyboard.press(key)
    page.wait_for_function(
        "(before) => document.body.dataset.sample !== before"
        " && new URLSearchParams(location.search).get('sample') === document.body.dataset.sample",
        arg=before,
    )
    return str(page.evaluate("() => document.body.dataset.sample"))


def draw_all(page: Page) -> None:
    """Open all that is folded, and look at every chart until all are drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.evaluate(SCROLL)
    page.wait_for_selector(".chart:not([data-drawn])", state="detached")


def serious(page: Page) -> list[Any]:
    """Return what axe finds serious or worse: each rule, with the first place."""
    if not page.evaluate("() => Boolean(window.axe)"):
        page.evaluate(AXE_SCRIPT)
    return list(page.evaluate(SERIOUS))


def hidden_stops(page: Page) -> list[Any]:
    """Return where Tab goes, of the page's first stops, that shows no ring, has no name, or is out of sight."""
    page.evaluate("document.activeElement.blur()")
    found = []
    for _ in range(TAB_STOPS):
        page.keyboard.press("Tab")
        stop = page.evaluate(STOP)
        if stop is None:
            break
        found += [] if stop["ring"] and stop["name"] and stop["seen"] else [stop]
    return found


def open_sample(page: Page) -> None:
    page.locator(".samples a").first.click()
    page.wait_for_selector(".turn")


@pytest.mark.parametrize(
    ("path", "ready"),
    [
        ("/", ".runs tbody tr"),
        ("/runs/first", ".chart svg"),
        ("/runs/early", ".empty"),
        ("/runs/first/samples", ".samples a"),
        ("/compare?run=first&run=second", ".chart svg"),
        ("/compare", ".empty"),
        ("/build?base=configs/rl_math.py", "#memory pre"),
    ],
)
def test_each_page_is_for_everybody(ui: Ui, browser: Browser, path: str, ready: str) -> None:
    """Goal: at the width of a telephone and of a desk, light and dark: all charts are drawn, nothing is wider than the
    screen, axe finds nothing serious, Tab goes from one visible, named place to the next, no error, no request to
    another machine. Red with `outline: none`."""
    with opened(browser, ui, path) as page:
        page.wait_for_selector(ready)
        if path.endswith("samples"):
            open_sample(page)
            page.get_by_role("button", name="log-prob").click()
        draw_all(page)
        assert page.locator(".chart[data-drawn=failed]").count() == 0
        assert hidden_stops(page) == []
        for width in (1440, 375):
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                page.wait_for_function(
                    "(width) => document.documentElement.scrollWidth === width", arg=width
                )
                assert serious(page) == [], (width, scheme)


def test_runs_are_found_and_marked(ui: Ui, browser: Browser) -> None:
    """Goal: words and filters narrow the list and stand in the address; j, x and the button lead to a comparison."""
    with opened(browser, ui) as page:
        assert page.locator("#count").inner_text() == "6 of 6 on this machine"
        page.keyboard.press("/")
        page.keyboard.type("runs sec")
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page).to_have_url(re.compile(r"q=runs\+sec"))
        page.reload()
        assert page.locator("tbody th").inner_text() == "second"
        page.fill("#search", "nothing like it")
        expect(page.locator(".empty")).to_contain_text("No run fits")
        page.fill("#search", "")
        page.select_option("#state", "unknown")
        page.keyboard.press("Escape")
        page.locator("h1").click()
        for _ in range(2):
            page.keyboard.press("j")
            page.keyboard.press("x")
        names = page.locator("tbody tr:has(input:checked) th").all_inner_texts()
        assert len(names) == 2
        page.get_by_role("button", name="Compare 2").click()
        expect(page).to_have_url(re.compile(r"/compare\?run=.+&run=.+"))
        page.goto(ui.base)
        page.keyboard.press("?")
        expect(page.locator("dialog")).to_contain_text("mark for a comparison")
        page.keyboard.press("Escape")
        expect(page.locator("dialog")).to_be_hidden()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        expect(page).to_have_url(re.compile(r"/runs/\w+$"))


def test_a_run_grows_while_one_looks(ui: Ui, browser: Browser, runs: Path) -> None:
    """Goal: a step, a line of the log, an event, an evaluation and a second log show up by themselves; what did not
    change or was opened stays as it is; a run that is removed says so on every address, and its page stays. Red with
    parts drawn anew that say the same as before, and with what was opened forgotten."""
    run = RunDir(runs / "live")
    with opened(browser, ui, "/runs/live", refused=True) as page:  # at the end it is gone
        page.wait_for_selector("body[data-live]")
        page.wait_for_selector(".chart[data-key='rl/reward_mean'][data-drawn=yes]")
        page.evaluate("document.querySelector('#config table').dataset.marked = 'yes'")
        page.locator("#environment summary").click()
        append_jsonl(run.metrics, rl_row(41, 40, 0.5, random.Random(0)))
        expect(page.locator("#stats .value").first).to_have_text("41 / 40")
        expect(page.locator("#config table[data-marked=yes]")).to_have_count(1)
        page.wait_for_selector(".chart[data-key='rl/reward_mean'][data-points='41']")
        with run.log("trainer").open("a") as log:
            log.write("a new line\n")
        expect(page.locator("#log")).to_contain_text("a new line")
        append_jsonl(run.events, {"time": START + 300, "kind": "warning", "message": "it is hot"})
        expect(page.locator("#events li").first).to_contain_text("it is hot")
        append_jsonl(run.eval, eval_row("rl", 41, "exact_match", 0.4321))
        expect(page.locator("#evaluations")).to_contain_text("0.4321")
        expect(page.locator("#environment details[open]")).to_have_count(1)
        page.select_option("#log-window", "engine-0")
        expect(page.locator("#log")).to_have_text(re.compile("engine is ready"))
        page.select_option("#event-class", "restart")
        expect(page.locator("#events li")).to_have_count(1)
        page.keyboard.press("Escape")
        shutil.rmtree(run.path)
        expect(page.locator("#gone")).to_contain_text("removed")
        expect(page.locator("h1")).to_have_text("live")
    with ui.client() as client:
        for path in (
            "/runs/live",
            "/runs/live/samples",
            "/api/runs/live/samples",
            "/api/runs/live",
        ):
            answer = client.get(path)
            assert answer.status_code == 404 and "removed" in answer.text, path


def test_samples_are_chosen_and_read(ui: Ui, browser: Browser) -> None:
    """Goal: filters and search choose, j and k walk, a group stands side by side and is marked without contrast, an
    episode's roles, thoughts and tools are told apart, tokens are texts with colours, and the address is a link to all
    of it."""
    with opened(
        browser, ui, "/runs/first/samples", permissions=["clipboard-read", "clipboard-write"]
    ) as page:
        expect(page.locator("#count")).to_have_text("322 of 322 samples")
        assert "no contrast" in page.locator(".samples a").first.inner_text()
        page.keyboard.press("j")
        expect(page.locator(".turn .role")).to_have_text(
            [
                "system",
                "user",
                "assistant: thinking",
                "assistant",
                "assistant: tool call",
                "tool: tool result",
                "assistant",
            ],
            ignore_case=True,
        )
        expect(page.locator(".turn.thinking")).to_contain_text("I need a sum.")
        expect(page.locator(".group a")).to_have_count(2)
        expect(page.locator(".response > span")).to_have_count(6)
        assert "".join(page.locator(".response > span").all_text_contents()) != "111213141516"
        trained = page.locator(".response > span").evaluate_all(
            "(all) => all.map((one) => !one.classList.contains('untrained'))"
        )
        assert trained == [True, True, False, False, True, True]
        page.get_by_role("button", name="log-prob").click()
        tones = page.locator(".response > span").evaluate_all(
            "(all) => all.map((one) => one.className.split(' ')[0])"
        )
        assert tones == ["", "n0", "n1", "n2", "n3", ""]
        page.get_by_role("button", name="|Δ| to the trainer").click()
        apart = page.locator(".response > span").evaluate_all(
            "(all) => all.map((one) => one.className)"
        )
        assert apart == ["", "n0", "untrained", "untrained", "n3", "n1"]
        expect(page.locator(".response > .n3")).to_have_attribute("title", re.compile(r"\|Δ\| 2$"))
        page.get_by_role("button", name="advantage", exact=True).click()
        expect(page.locator(".response > span.p2")).to_have_count(4)
        page.evaluate(KEEP_ANNOUNCED)
        page.keyboard.press("c")
        page.wait_for_function("window.announced.includes('Copied prompt and response.')")
        assert page.evaluate("navigator.clipboard.readText()").endswith(
            page.locator(".group a[aria-current] pre").inner_text()
        )
        walk(page, "j")
        at = walk(page, "j")
        walk(page, "k")
        page.go_back()
        expect(page.locator("body")).to_have_attribute("data-sample", at)
        page.goto(page.url)
        expect(page.locator("body")).to_have_attribute("data-sample", at)
        expect(page.locator(".samples a[aria-current]")).to_have_attribute("data-offset", at)


def test_filters_stand_in_the_address(ui: Ui, browser: Browser) -> None:
    """Goal: each filter narrows the list at once and is kept by a link; one prompt is shown through training; a search
    finds text."""
    with opened(browser, ui, "/runs/first/samples", refused=True) as page:
        count = page.locator("#count")
        page.fill("[name=step_min]", "40")
        expect(count).to_have_text("10 of 322 samples")
        page.select_option("[name=contrast]", "no")
        expect(count).to_have_text("2 of 322 samples")
        page.reload()
        expect(count).to_have_text("2 of 322 samples")
        page.get_by_role("button", name="Clear").click()
        page.keyboard.press("/")
        page.keyboard.type("ANSWER 7.3")
        expect(count).to_have_text("1 found")
        page.locator(".samples a").first.click()
        expect(
            page.locator("section", has_text="This prompt through training: 40 steps").first
        ).to_be_visible()
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Same prompt").click()
        expect(count).to_have_text("160 of 322 samples")
        page.reload()
        expect(page.locator("#prompt-chip")).to_contain_text("prompt p0")
        expect(count).to_have_text("160 of 322 samples")
        page.get_by_role("link", name="last: step 40").click()
        expect(page.locator(".detail-head")).to_contain_text("step 40")
        page.fill("[name=reward_min]", "2")
        expect(page.locator(".samples .empty")).to_contain_text("No sample fits")
        for word in ("order=size", "sample=7", "step_min=x"):
            page.goto(f"{ui.base}/runs/second/samples?{word}")
            page.wait_for_selector(".empty")


def test_what_a_model_wrote_is_never_run(ui: Ui, browser: Browser) -> None:
    """Goal: HTML, templates and terminal escapes in samples, events, logs, configs and names are shown as text on every
    page."""
    with opened(browser, ui, "/runs/hostile") as page:
        draw_all(page)
        expect(page.locator("#log")).to_contain_text("whole")
        log = page.locator("#log").inner_text()
        assert (
            "\x1b" not in log
            and "50%" not in log
            and "<script>window.owned" in log
            and "\nred\n" in log
        )
        for path in (
            "/runs/hostile/samples",
            "/compare?run=hostile&run=second",
            "/",
            "/runs/hostile",
        ):
            page.goto(f"{ui.base}{path}")
            if path.endswith("samples"):
                page.wait_for_selector(".samples a")
                open_sample(page)
                page.get_by_role("button", name="Same prompt").click()
                page.wait_for_selector("#prompt-chip .chip")
            page.wait_for_load_state("networkidle" if path != "/runs/hostile" else "load")
            assert page.evaluate("window.owned") is None, path
            text = page.content()
            assert (
                "\x1b" not in text
                and "\u202e" not in text
                and page.locator("img[src=x]").count() == 0
            )


def test_a_comparison_is_put_together(ui: Ui, browser: Browser) -> None:
    """Goal: a run is added by the beginning of its name and left out again; seeds are one line, configs and last
    evaluations stand below."""
    with opened(browser, ui, "/compare?run=first") as page:
        expect(page.locator(".empty")).to_contain_text("One run is chosen")
        page.keyboard.press("/")
        page.keyboard.type("sec")
        page.keyboard.press("Enter")
        expect(page).to_have_url(re.compile("run=first&run=second"))
        expect(page.locator("section", has_text="second against first").last).to_contain_text(
            "rl.sampling.seed"
        )
        assert (
            page.locator("section", has_text="Held-out rows")
            .locator("td.number")
            .first.inner_text()
            .count("(")
            == 1
        )
        page.get_by_role("button", name="leave out first").click()
        expect(page).to_have_url(re.compile(r"compare\?run=second$"))


@pytest.mark.parametrize("path", ["/runs/damaged", "/runs/damaged/samples"])
def test_damage_is_told(ui: Ui, browser: Browser, path: str) -> None:
    """Goal: a page of a damaged run shows what can be read, and counts what cannot."""
    with opened(browser, ui, path) as page:
        expect(page.locator(".notice").first).to_contain_text("damaged")
        page.wait_for_selector(".chart, .samples a")


def test_what_is_not_there_is_said(ui: Ui) -> None:
    """Goal: a run that does not exist, a name that none can have, a page and a metric that there are not: 404 and one
    sentence."""
    paths: dict[str, Any] = {
        "/runs/none": "there is no run",
        "/runs/..%2f..": "There is no such page",
        "/runs/a.b": "is not the name of a run",
        "/nothing": "There is no such page",
        "/api/runs/none": "there is no run",
        "/api/chart?run=first&stage=rl&name=none": "logged",
        "/api/chart?stage=rl&name=loss": "0 runs are asked for",
        "/api/runs/first/samples/7": "no sample at byte 7",
        "/api/runs/first/samples/x": "needs a number",
    }
    with ui.client() as client:
        for path, said in paths.items():
            answer = client.get(path)
            assert answer.status_code in (400, 404) and said in answer.text, (
                path,
                answer.text[:300],
            )
