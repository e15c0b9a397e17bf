"""What a report says in tables: each a value, out of what was read. Pure."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rollouts.view.answer_changes import (
    AnswerPair,
    AnswerPoint,
    ShareCell,
    answer_points,
    between_runs,
    changed_rows,
    share_cells,
    tasks_of,
)
from rollouts.view.charts import event_class, event_text
from rollouts.view.estimates import Interval
from rollouts.view.fold import evaluation_table, number
from rollouts.view.rollout_samples import RolloutSample
from rollouts.view.run_data import RunData, prompt_text

# what is drawn large, in this order; the other numbers follow
FIRST_METRICS = (
    "reward_mean",
    "eval_exact_match",
    "loss",
    "validation_loss",
    "entropy",
    "kl_sampler",
    "kl_reference",
    "response_length_mean",
    "truncated_frac",
    "groups_zero_std_frac",
    "grad_norm",
    "tokens_per_s",
)
LAST_STEPS = 20
PAIRS_MAX = 12
TEXT_MAX = 1500  # characters of a prompt or an answer that are shown
EVENTS_MAX = 60


@dataclass(frozen=True)
class MetricRow:
    """One number of one stage: where it began, where it ended."""

    stage: str
    name: str
    first: float
    last: float
    end_mean: float  # over the last LAST_STEPS logged steps
    steps: int


@dataclass(frozen=True)
class ShownPair:
    """A row that changed between two evaluations, as text."""

    row: int
    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class ChangedRows:
    """The rows that changed from one evaluation to the next: how many, and the first of them."""

    before: str
    after: str
    better_count: int
    worse_count: int
    better: tuple[ShownPair, ...]
    worse: tuple[ShownPair, ...]


@dataclass(frozen=True)
class AnswerTable:
    """Shares of right answers: a row a task, a column an evaluation."""

    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[ShareCell | None, ...]], ...]


@dataclass(frozen=True)
class RunComparison:
    """What one run's last evaluation has over the first run's, over the prompts that both answered."""

    run: str
    other: str
    difference: Interval
    paired: int


def metric_rows(run: RunData) -> list[MetricRow]:
    """Return first, last and last mean of every number that a run logged."""
    rows = []
    for stage in run.stages:
        for name in run.metric_names(stage):
            values = run.series(stage, name).values
            rows.append(
                MetricRow(
                    stage, name, values[0], values[-1], fmean(values[-LAST_STEPS:]), len(values)
                )
            )
    return rows


def answer_table(points: Sequence[AnswerPoint]) -> AnswerTable | None:
    if not points:
        return None
    rows = tuple((task, tuple(share_cells(points, task))) for task in tasks_of(points))
    return AnswerTable(tuple(f"{point.label}, step {point.step}" for point in points), rows)


def other_evaluations(run: RunData) -> list[list[str]]:
    """Return what was measured beside exact match: a header, then a row a metric."""
    rows = tuple(
        {"split": "", "task": "all", **row}
        for row in run.evaluations
        if row["metric"] != "exact_match"
    )
    return evaluation_table(rows)


def changes(points: Sequence[AnswerPoint]) -> list[ChangedRows]:
    """Return which rows got better and worse from each evaluation to the next."""
    found = []
    for first, second in itertools.pairwise(points):
        better, worse = changed_rows(first, second)
        found.append(
            ChangedRows(
                first.label,
                second.label,
                len(better),
                len(worse),
                tuple(map(_shown_pair, better[:PAIRS_MAX])),
                tuple(map(_shown_pair, worse[:PAIRS_MAX])),
            )
        )
    return found


def _shown_pair(pair: AnswerPair) -> ShownPair:
    asked = pair.after
    return ShownPair(
        asked.row,
        cut(prompt_text(asked.prompt)),
        cut(asked.expected or ""),
        cut(pair.before.answer),
        cut(asked.answer),
    )


def comparisons(runs: Sequence[tuple[str, RunData]]) -> list[RunComparison]:
    """Return how the last evaluations differ from the first run's, where they share prompts."""
    last = [(label, points[-1]) for label, run in runs if (points := answer_points(run))]
    found = []
    for label, point in last[1:]:
        difference, paired = between_runs(last[0][1], point)
        if difference is not None:
            found.append(RunComparison(label, last[0][0], difference, paired))
    return found


def event_rows(run: RunData) -> list[tuple[float, str, str, str]]:
    """Return faults and restarts: (time, kind, class, text), the last EVENTS_MAX."""
    found = [
        (row["time"], row["kind"], event_class(row), cut(event_text(row))) for row in run.events
    ]
    return [row for row in found if row[2] != "other"][-EVENTS_MAX:]


def sample_text(sample: RolloutSample) -> tuple[str, str]:
    """Return a sample's prompt and response as they are shown."""
    return cut(prompt_text(sample.prompt)), cut(sample.response)


def cut(text: str) -> str:
    """Return the beginning of a long text, and how much is left out."""
    return (
        text
        if len(text) <= TEXT_MAX
        else f"{text[:TEXT_MAX]}… ({len(text) - TEXT_MAX} more characters)"
    )


def chart_names(runs: Sequence[RunData], stage: str) -> tuple[list[str], list[str]]:
    """Return the numbers of a stage that are drawn first, and the others that ever change."""
    names = list(dict.fromkeys(name for run in runs for name in run.metric_names(stage)))
    first = [name for name in FIRST_METRICS if name in names]
    rest = [name for name in names if name not in first and _moves(runs, stage, name)]
    return first, rest


def _moves(runs: Sequence[RunData], stage: str, name: str) -> bool:
    return len({value for run in runs for value in run.series(stage, name).values}) > 1


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def share_words(cell: ShareCell) -> str:
    """Return a share with its interval: `39.6 % (35.4 to 44.0)`."""
    return (
        f"{percent(cell.share.value)} ({100 * cell.share.low:.1f} to {100 * cell.share.high:.1f})"
    )


def change_words(change: Interval) -> str:
    """Return a difference in points with its interval: `+12.0 (+8.2 to +15.8)`."""
    return f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def environment_rows(run: RunData) -> list[tuple[str, str]]:
    """Return what ran: state, code, model, packages that matter."""
    state = "unknown" if run.status is None else f"{run.status.state}: {run.status.message}"
    code = (run.commit or "no commit was recorded") + (
        ", with uncommitted changes" if run.uncommitted else ""
    )
    named = dict(line.partition("==")[::2] for line in run.packages)
    rows = [
        ("state", state),
        ("commit", code),
        ("code", run.code_digest[:12] or "no digest was recorded"),
    ]
    rows.append(("model", _config_text(run.config, "model", "name")))
    return rows + [
        (name, named[name])
        for name in ("torch", "transformers", "datasets", "peft")
        if name in named
    ]


def _config_text(config: dict[str, Any] | None, section: str, field: str) -> str:
    found = (config or {}).get(section)
    return number(found.get(field, "?")) if isinstance(found, dict) else "?"
