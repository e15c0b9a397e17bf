"""Compare answers to held-out rows between base, SFT and RL: shares with intervals, rows that changed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rollouts.view.estimates import Interval, paired_bootstrap, wilson
from rollouts.view.fold import BEFORE
from rollouts.view.run_data import HeldOutAnswer, RunData

Key = TypeVar("Key")
ALL = "all"


@dataclass(frozen=True)
class AnswerPoint:
    """One evaluation that is compared: all its answers, by row."""

    label: str  # "base", "before", "sft" or "rl"
    step: int
    answers: Mapping[int, HeldOutAnswer]

    def of_task(self, task: str) -> list[HeldOutAnswer]:
        return [answer for answer in self.answers.values() if task in (ALL, answer.task)]


@dataclass(frozen=True)
class ShareCell:
    """A share of right answers, and its change from the evaluation before over the rows that both answered."""

    hits: int
    total: int
    share: Interval
    change: Interval | None
    paired: int  # rows that both answered


@dataclass(frozen=True)
class AnswerPair:
    """A row that was right in one evaluation and wrong in another."""

    before: HeldOutAnswer
    after: HeldOutAnswer


def answer_points(run: RunData) -> list[AnswerPoint]:
    """Return the last evaluation of base, SFT and RL, in order; of a run that began at a checkpoint also what it had.

    RL's evaluation before its first step is of what SFT made: it counts only where SFT answered nothing.
    """
    by_stage: dict[str, dict[int, dict[int, HeldOutAnswer]]] = {}
    for answer in run.answers:
        by_stage.setdefault(answer.stage, {}).setdefault(answer.step, {})[answer.row] = answer
    points: list[AnswerPoint] = []
    for stage in ("base", "sft", "rl"):
        steps = by_stage.get(stage, {})
        if stage != "base" and 0 in steps and not points:
            points.append(AnswerPoint(BEFORE, 0, steps[0]))
        if (
            stage == "rl"
            and 0 in steps
            and points
            and points[-1].label == "base"
            and "sft" in run.metrics
        ):
            points.append(AnswerPoint("sft", 0, steps[0]))
        if trained := [step for step in steps if step or stage == "base"]:
            points.append(AnswerPoint(stage, max(trained), steps[max(trained)]))
    return points


def tasks_of(points: Sequence[AnswerPoint]) -> list[str]:
    """Return `all`, and each task where there are several."""
    found = sorted({answer.task for point in points for answer in point.answers.values()})
    return [ALL, *found] if len(found) > 1 else [ALL]


def share_cells(points: Sequence[AnswerPoint], task: str) -> list[ShareCell | None]:
    """Return each evaluation's share of right answers; None where it answered no row of the task."""
    cells: list[ShareCell | None] = []
    for at, point in enumerate(points):
        answers = point.of_task(task)
        if not answers:
            cells.append(None)
            continue
        hits = sum(answer.correct for answer in answers)
        before = points[at - 1].of_task(task) if at else []
        change, paired = _change({a.row: a for a in before}, {a.row: a for a in answers})
        cells.append(ShareCell(hits, len(answers), wilson(hits, len(answers)), change, paired))
    return cells


def between_runs(first: AnswerPoint, second: AnswerPoint) -> tuple[Interval | None, int]:
    """Return the second's share less the first's over the prompts that both answered, and how many these are."""
    return _change(_by_prompt(first), _by_prompt(second))


def _by_prompt(point: AnswerPoint) -> dict[str, HeldOutAnswer]:
    return {answer.prompt_id: answer for answer in point.answers.values()}


def _change(
    before: Mapping[Key, HeldOutAnswer], after: Mapping[Key, HeldOutAnswer]
) -> tuple[Interval | None, int]:
    both = [key for key in after if key in before]
    if not both:
        return None, 0
    pairs = (
        [float(before[key].correct) for key in both],
        [float(after[key].correct) for key in both],
    )
    return paired_bootstrap(*pairs), len(both)


def changed_rows(
    first: AnswerPoint, second: AnswerPoint
) -> tuple[list[AnswerPair], list[AnswerPair]]:
    """Return the rows that got better and those that got worse, in the order of rows."""
    pairs = [
        AnswerPair(first.answers[row], second.answers[row])
        for row in sorted(second.answers)
        if row in first.answers
    ]
    better = [pair for pair in pairs if pair.after.correct and not pair.before.correct]
    return better, [pair for pair in pairs if pair.before.correct and not pair.after.correct]
