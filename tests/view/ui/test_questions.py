"""The questions of docs/reference/questions.md, each answered in a browser in three clicks at most from the list of
runs, on one set of runs whose answers are known."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from rollouts.run_dir import RunDir, Status, append_jsonl, write_json_atomic
from tests.docs_blocks import ROOT
from tests.view.runs import START, rollout_row, write_run
from tests.view.ui.conftest import Ui, opened

PAGE = ROOT / "docs" / "reference" / "questions.md"
CLICKS_MAX = 3
STEPS = 60
SLOW = 40  # the step that an engine's restart delays


class Walk:
    """A page, and how many clicks were made since the list of runs."""

    def __init__(self, page: Page) -> None:
        self.page, self.clicks = page, 0

    def click(self, target: Any) -> None:
        self.clicks += 1
        target.click()

    def choose(self, select: str, label: str) -> None:
        self.clicks += 1
        self.page.locator(select).select_option(label=label)

    def press(self, key: str) -> None:
        self.clicks += 1
        self.page.keyboard.press(key)

    def open(self, run: str) -> None:
        self.click(self.page.get_by_role("link", name=run, exact=True))
        self.page.wait_for_selector("#stats .stat")  # drawn by the script that listens

    def samples(self, run: str) -> None:
        self.open(run)
        self.click(self.page.get_by_role("link", name="Samples", exact=True))
        self.page.wait_for_selector(".samples a")

    def compare(self, *runs: str) -> None:
        for run in runs:
            self.click(self.page.get_by_label(f"compare {run}", exact=True))
        self.click(self.page.get_by_role("button", name="Compare"))

    def section(self, title: str) -> Any:
        return self.page.locator("section").filter(
            has=self.page.get_by_role("heading", name=title, exact=True)
        )


def failed_this_week(walk: Walk) -> None:
    walk.choose("#state", "failed")
    walk.choose("#since", "1 week")
    expect(walk.page.locator("tbody th a")).to_have_text(["broken"])


def why_did_it_fail(walk: Walk) -> None:
    walk.open("broken")
    expect(walk.page.locator("#remarks")).to_contain_text("CUDA ran out of memory")


def does_it_learn(walk: Walk) -> None:
    walk.open("slow")
    stat = walk.page.locator(".stat", has_text="reward_mean")
    expect(stat).to_contain_text("began at 0.2")
    assert float(stat.locator(".value").inner_text()) > 0.6  # `expect` waited for it


def is_something_wrong(walk: Walk) -> None:
    walk.open("broken")
    walk.click(walk.page.locator(".symptom summary", has_text="truncated"))
    expect(walk.page.locator(".symptom[open]")).to_contain_text("Raise rl.max_new_tokens")


def why_is_step_40_slow(walk: Walk) -> None:
    walk.open("slow")
    row = walk.page.get_by_role("region", name="Slow steps").locator("tbody tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text(re.compile(rf"{SLOW}.*sync \+7.*engine restarted"))


def did_an_engine_die(walk: Walk) -> None:
    walk.open("slow")
    walk.choose("#event-class", "restarts")
    expect(walk.page.locator("#events li").first).to_contain_text("it died")


def what_does_the_trainer_say(walk: Walk) -> None:
    walk.open("slow")
    expect(walk.page.locator("#log")).to_contain_text("the last word")


def which_got_worse(walk: Walk) -> None:
    walk.open("slow")
    part = walk.page.locator("#answers h3", has_text="to rl").last.locator(
        "xpath=following-sibling::details[1]"
    )
    expect(part).to_be_visible()
    if "got worse" not in part.inner_text():
        part = part.locator("xpath=following-sibling::details[1]")
    walk.click(part.locator("summary"))
    expect(part.locator(".card").first).to_contain_text("Q ")


def rewards(section: Any) -> list[float]:
    cells = section.locator("tr", has_text="reward_mean").locator("td.number")
    expect(cells).to_have_count(2)
    return [float(text) for text in cells.all_inner_texts()]


def better_at_equal_tokens(walk: Walk) -> None:
    walk.compare("slow", "small")
    slow, small = rewards(walk.section("At equal tokens").last)
    assert small > slow
    slow, small = rewards(walk.section("Last numbers"))
    assert small < slow  # at their own ends it is the other way round


def where_do_configs_differ(walk: Walk) -> None:
    walk.compare("slow", "small")
    expect(walk.section("Configs")).to_contain_text("rl.examples_per_step")


def what_earns_the_most(walk: Walk) -> None:
    walk.samples("slow")
    walk.choose("[name=order]", "best reward")
    expect(walk.page.locator(".samples a").first).to_contain_text("the best of all")


def which_were_cut_off(walk: Walk) -> None:
    walk.samples("slow")
    walk.choose("#finish", "length")
    expect(walk.page.locator("#count")).to_have_text("2 of 484 samples")


def which_teach_nothing(walk: Walk) -> None:
    walk.samples("slow")
    walk.choose("[name=contrast]", "without contrast")
    expect(walk.page.locator("#count")).to_have_text("2 of 484 samples")


def one_prompt_through_training(walk: Walk) -> None:
    walk.samples("slow")
    walk.click(walk.page.locator(".samples a", has_text=f"answer {STEPS}.").first)
    expect(walk.page.locator("#detail")).to_contain_text(f"This prompt through training: {STEPS}")


def which_tokens_are_trained_on(walk: Walk) -> None:
    walk.samples("slow")
    walk.press("j")
    expect(walk.page.locator(".response > span.untrained")).to_have_count(2)


WALKS: dict[str, Callable[[Walk], None]] = {
    "Which runs failed this week?": failed_this_week,
    "Why did it fail?": why_did_it_fail,
    "Does it learn?": does_it_learn,
    "Is something wrong with it?": is_something_wrong,
    "Why is step 40 slow?": why_is_step_40_slow,
    "Did an engine die?": did_an_engine_die,
    "What does the trainer say now?": what_does_the_trainer_say,
    "Which prompts got worse after RL?": which_got_worse,
    "Which run has the better reward at equal tokens?": better_at_equal_tokens,
    "Where do two configs differ?": where_do_configs_differ,
    "What earns the most?": what_earns_the_most,
    "Which answers were cut off?": which_were_cut_off,
    "Which prompts teach nothing?": which_teach_nothing,
    "How did one prompt go through training?": one_prompt_through_training,
    "Which tokens are trained on?": which_tokens_are_trained_on,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one with a slow step, one of smaller batches that learns more by the token, one that failed."""
    root = tmp_path_factory.mktemp("asked")
    slow = write_run(root / "slow", steps=STEPS, gain=0.5)
    small = write_run(root / "small", steps=STEPS, seed=1, gain=0.4)
    broken = write_run(root / "broken", steps=STEPS, seed=2)
    tokens(slow, 4000)
    tokens(small, 1000)
    rewrite(slow, lambda row: slowed(row) if (row["stage"], row["step"]) == ("rl", SLOW) else row)
    rewrite(broken, lambda row: {**row, "truncated_frac": 0.9})
    config = json.loads(small.config.read_text())
    config["rl"]["examples_per_step"] //= 2
    small.config.write_text(json.dumps(config))
    at = START + 100 + 2.0 * SLOW - 4
    restart = {"kind": "engine_restarted", "stage": "rl", "window": "engine-0"}
    append_jsonl(slow.events, {"time": at, **restart, "reason": "it died", "restarts_left": 1})
    odd_samples(slow)
    for run, state, message in (
        (slow, "done", "all stages done"),
        (small, "done", "all stages done"),
        (broken, "failed", "stage rl: CUDA ran out of memory"),
    ):
        run.log("trainer").parent.mkdir()
        run.log("trainer").write_text("step 60\nthe last word\n")
        write_json_atomic(run.status, status(run, state, message))
    return root


def status(run: RunDir, state: Any, message: str) -> Status:
    now = time.time()
    return Status(
        run_id=run.run_id,
        experiment_name="asked",
        state=state,
        stage="rl",
        message=message,
        started_at=now - 3600,
        updated_at=now,
        exit_code=0 if state == "done" else 1,
    )


def rewrite(run: RunDir, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [change(json.loads(line)) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokens(run: RunDir, count: int) -> None:
    rewrite(run, lambda row: {**row, "trained_tokens": count})


def slowed(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "step_s": row["step_s"] + 7.0, "sync_s": row["sync_s"] + 7.0}


def odd_samples(run: RunDir) -> None:
    """Add a group without contrast whose answers were cut off, and the best answer of all; tokens of both."""
    row = rollout_row(STEPS + 1, 0, random.Random(0), 4) | {"prompt_id": "odd", "reward": 0.5}
    row |= {
        "tokens": [1, 2, 3, 4],
        "response_length": 3,
        "rollout_log_probs": [-0.1, -2.0, -0.1],
        "loss_mask": [0.0, 1.0, 0.0, 0.0],
        "finish_reason": "length",
    }
    best = rollout_row(1, 0, random.Random(0), 4) | {"prompt_id": "best", "step": STEPS, "group": 9}
    append_jsonl(
        run.rollouts,
        best | {"response": "the best of all", "reward": 9.0},
        best | {"response": "not that good", "reward": 0.0},
        row,
        row,
    )


@pytest.fixture(scope="module")
def ui(runs: Path, serve: Callable[..., Ui]) -> Ui:
    return serve(*(runs / name for name in ("slow", "small", "broken")))


def test_every_question_is_walked() -> None:
    """Goal: the page and the walks have the same fifteen questions. Red with one left out of either."""
    asked = re.findall(r"^\| ([^|]+\?) \|", PAGE.read_text(), re.MULTILINE)
    assert asked == list(WALKS) and len(asked) == 15


def test_questions_are_answered_in_three_clicks(ui: Ui, browser: Browser) -> None:
    """Goal: from the list of runs each answer is on the screen after three clicks at most."""
    counts = {}
    with opened(browser, ui) as page:
        for question, answer in WALKS.items():
            page.goto(ui.base)
            expect(page.locator("tbody tr")).to_have_count(3)
            walk = Walk(page)
            answer(walk)
            counts[question] = walk.clicks
    assert {question: count for question, count in counts.items() if count > CLICKS_MAX} == {}
