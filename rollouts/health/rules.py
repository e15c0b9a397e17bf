"""Rules over a run's records: what looks wrong, what it means, what to do. Pure.

docs/reference/symptoms.md is made from RULES.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rollouts.health.series import Records, Series
from rollouts.health.usage import gpu_loads

WINDOW = 20  # logged steps at the end that are judged
BEGINNING = 5  # logged steps at the start that they are compared with
NO_CONTRAST = 0.8
TRUNCATED = 0.3
ENTROPY_LEFT = 0.02  # of the entropy at the start
KL_MIN, KL_GROWTH = 0.01, 5.0
LENGTH_GROWTH = 2.0
SPIKE = 10.0  # times the median before
VALIDATION_RISE, EVALUATIONS_AFTER = 0.05, 2
SPEED_LEFT = 0.7
STANDARD_ERRORS = 2.0
GPU_IDLE = 0.5
IDLE_SAMPLES_MIN, IDLE_SAMPLES = 24, 120  # of a stage's GPUs: two minutes at first, then ten

# The metrics that the rules look at
JUDGED = (
    "reward_mean",
    "groups_zero_std_frac",
    "entropy",
    "kl_sampler",
    "truncated_frac",
    "response_length_mean",
    "grad_norm",
    "tokens_per_s",
)


@dataclass(frozen=True)
class Symptom:
    """A rule that a run breaks, with the numbers that say so."""

    cause: str  # the rule's name
    stage: str
    detail: str
    means: str
    fix: str


@dataclass(frozen=True)
class Rule:
    """One way in which a run may go wrong."""

    cause: str
    when: str  # the bound, in words
    means: str
    fix: str
    check: Callable[[Records], Iterator[tuple[str, str]]]  # (stage, detail) of each finding


def symptoms(run: Records) -> tuple[Symptom, ...]:
    """Return what looks wrong in a run, in the order of RULES."""
    return tuple(
        Symptom(rule.cause, stage, detail, rule.means, rule.fix)
        for rule in RULES
        for stage, detail in rule.check(run)
    )


def _end(series: Series) -> float:
    return statistics.fmean(series.values[-WINDOW:])


def _start(series: Series) -> float:
    return statistics.fmean(series.values[:BEGINNING])


def _is_long(series: Series) -> bool:
    """Return whether its end and its start are different steps."""
    return len(series.values) >= WINDOW + BEGINNING


def _reward_flat(run: Records) -> Iterator[tuple[str, str]]:
    rewards = run.series("rl", "reward_mean").values
    quarter = len(rewards) // 4
    if quarter < WINDOW // 2:
        return
    first, last = rewards[:quarter], rewards[-quarter:]
    rise = statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / quarter)
    if rise <= STANDARD_ERRORS * error:
        means = f"{statistics.fmean(first):.3g} in the first {quarter} steps, {statistics.fmean(last):.3g} in the last"
        yield (
            "rl",
            f"the mean reward was {means}; chance alone moves it by {STANDARD_ERRORS * error:.2g}",
        )


def _no_contrast(run: Records) -> Iterator[tuple[str, str]]:
    series = run.series("rl", "groups_zero_std_frac")
    if len(series.values) >= BEGINNING and (share := _end(series)) > NO_CONTRAST:
        yield (
            "rl",
            f"{share:.0%} of the groups had no contrast, over the last {min(WINDOW, len(series.values))} steps",
        )


def _entropy_collapse(run: Records) -> Iterator[tuple[str, str]]:
    series = run.series("rl", "entropy")
    if _is_long(series) and _end(series) < ENTROPY_LEFT * _start(series):
        yield "rl", f"entropy fell from {_start(series):.3g} to {_end(series):.3g} nats a token"


def _sampler_kl(run: Records) -> Iterator[tuple[str, str]]:
    series = run.series("rl", "kl_sampler")
    if _is_long(series) and _end(series) > max(KL_MIN, KL_GROWTH * _start(series)):
        yield "rl", f"kl_sampler grew from {_start(series):.2g} to {_end(series):.2g}"


def _truncated(run: Records) -> Iterator[tuple[str, str]]:
    series = run.series("rl", "truncated_frac")
    if len(series.values) >= BEGINNING and (share := _end(series)) > TRUNCATED:
        yield (
            "rl",
            f"{share:.0%} of the responses were cut off, over the last {min(WINDOW, len(series.values))} steps",
        )


def _length_drift(run: Records) -> Iterator[tuple[str, str]]:
    series = run.series("rl", "response_length_mean")
    if not _is_long(series) or _start(series) <= 0:
        return
    growth = _end(series) / _start(series)
    if growth > LENGTH_GROWTH or growth < 1 / LENGTH_GROWTH:
        yield "rl", f"responses went from {_start(series):.3g} to {_end(series):.3g} tokens"


def _grad_norm(run: Records) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        series = run.series(stage, "grad_norm")
        found = []
        for place in range(WINDOW, len(series.values)):
            before, value = series.values[place - WINDOW : place], series.values[place]
            if value <= SPIKE * min(before):
                continue  # no median is less, and a median takes long
            usual = statistics.median(before)
            if usual > 0 and value > SPIKE * usual:
                found.append(f"{series.values[place]:.3g} at step {series.steps[place]}")
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            yield stage, f"grad_norm was {', '.join(found[:5])}{more}"


def _validation_rises(run: Records) -> Iterator[tuple[str, str]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.evaluations:
        if (
            row["metric"] == "validation_loss"
            and row.get("task", "all") == "all"
            and row.get("value") is not None
        ):
            found.setdefault(row["stage"], []).append((row["step"], row["value"]))
    for stage, points in found.items():
        least = min(range(len(points)), key=lambda place: points[place][1])
        (step, low), (last_step, last) = points[least], points[-1]
        if len(points) - 1 - least >= EVALUATIONS_AFTER and last > (1 + VALIDATION_RISE) * low:
            yield (
                stage,
                f"validation loss was {low:.4g} at step {step}, and is {last:.4g} at step {last_step}",
            )


def _throughput(run: Records) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        series = run.series(stage, "tokens_per_s")
        if len(series.values) < 2 * WINDOW:
            continue
        before, now = (
            statistics.median(series.values[:-WINDOW]),
            statistics.median(series.values[-WINDOW:]),
        )
        if now < SPEED_LEFT * before:
            yield stage, f"{now:.4g} tokens/s over the last {WINDOW} steps, {before:.4g} before"


def _restarts(run: Records) -> Iterator[tuple[str, str]]:
    found = [row for row in run.events if row["kind"] == "engine_restarted"]
    if found:
        reasons = list(dict.fromkeys(f"{row.get('window')}: {row.get('reason')}" for row in found))
        yield "rl", f"{len(found)} restart(s); {'; '.join(reasons[:3])}"


def _gpu_idle(run: Records) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        times = run.series(stage, "tokens_per_s").times
        if not times:
            continue
        # from the first logged step on: loading a model is not training
        rows = [row for row in run.usage if row["stage"] == stage and row["time"] >= times[0]]
        rows = [row for row in rows if row["time"] <= times[-1]][-IDLE_SAMPLES:]
        loads = gpu_loads(rows) if len(rows) >= IDLE_SAMPLES_MIN else []
        found = [
            f"GPU {load.gpu} ({', '.join(load.processes)}) was idle {load.idle:.0%} of the time"
            for load in loads
            if load.idle > GPU_IDLE
        ]
        if found:
            minutes = (rows[-1]["time"] - rows[0]["time"]) / 60
            yield stage, f"{'; '.join(found)}, over the last {minutes:.0f} minutes of steps"


RULES: tuple[Rule, ...] = (
    Rule(
        "reward_flat",
        f"the last quarter's mean reward is not above the first's by {STANDARD_ERRORS:g} standard errors",
        "RL learns nothing that the reward sees, or the model had reached the top already.",
        "Read the best and the worst samples. Then a reward that some answers earn, a higher learning rate, or SFT.",
        _reward_flat,
    ),
    Rule(
        "groups_without_contrast",
        f"`groups_zero_std_frac` over {NO_CONTRAST:g}, over the last {WINDOW} steps",
        "Most prompts are always solved or never: their samples have no advantage and teach nothing.",
        "Choose prompts that the model sometimes solves, draw more samples of each, or raise the temperature.",
        _no_contrast,
    ),
    Rule(
        "entropy_collapse",
        f"`entropy` under {ENTROPY_LEFT:.0%} of its start",
        "The policy gives one answer to a prompt; it explores no more. A task that is solved looks the same.",
        "Lower the learning rate, raise clip_high or entropy_coef, or stop: more steps bring little.",
        _entropy_collapse,
    ),
    Rule(
        "sampler_kl_grows",
        f"`kl_sampler` over {KL_MIN:g}, and over {KL_GROWTH:g} times its start",
        "Trainer and engine disagree on the same tokens: the samples are old, or the engine computes otherwise.",
        "Lower the lag (rl.ahead, updates_per_batch), check dtype and sampling options, or weigh by importance.",
        _sampler_kl,
    ),
    Rule(
        "truncated",
        f"`truncated_frac` over {TRUNCATED:g}, over the last {WINDOW} steps",
        "Responses are cut off before their answer: they earn nothing, whatever they would have said.",
        "Raise rl.max_new_tokens, or first teach the model to stop.",
        _truncated,
    ),
    Rule(
        "length_drift",
        f"`response_length_mean` more than {LENGTH_GROWTH:g} times its start, or less than half of it",
        "The reward pays for length, or for brevity.",
        "Look at length against reward. Then a reward that judges the answer alone, or another aggregation.",
        _length_drift,
    ),
    Rule(
        "grad_norm_spikes",
        f"`grad_norm` over {SPIKE:g} times the median of the {WINDOW} steps before",
        "A batch with an odd row, or a learning rate at the edge of what is stable.",
        "Look at that step's samples. Lower max_grad_norm or the learning rate, or warm up longer.",
        _grad_norm,
    ),
    Rule(
        "validation_rises",
        f"`validation_loss` {VALIDATION_RISE:.0%} over its least, {EVALUATIONS_AFTER} evaluations or more ago",
        "The model learns its training rows by heart.",
        "Go on from the checkpoint at the least; fewer epochs, more data, or a lower learning rate.",
        _validation_rises,
    ),
    Rule(
        "throughput_drop",
        f"`tokens_per_s` of the last {WINDOW} steps under {SPEED_LEFT:.0%} of the steps before (medians)",
        "Something slows the run: another process, a hot or throttled GPU, longer answers, an engine that was lost.",
        "See which part of a step grew, then the host: `deploy --remote HOST`.",
        _throughput,
    ),
    Rule(
        "engine_restarts",
        "an engine was started again",
        "It died or hung. Its requests are repeated, which costs time; after `engine.restarts_max` the run ends.",
        "Read the end of its log: `deploy logs RUN --window engine-0`. Often memory: a lower mem_fraction.",
        _restarts,
    ),
    Rule(
        "gpu_idle",
        f"a GPU idle over {GPU_IDLE:.0%} of the last {IDLE_SAMPLES} samples of `gpu.jsonl`, "
        f"of {IDLE_SAMPLES_MIN} at least",
        "You pay for a GPU that waits: the trainer for samples, the engine for the trainer, or both for data.",
        "See which part of a step is long. `rl.ahead` lets both work at once; a colocated engine needs fewer GPUs; "
        "then more samples a step, or longer micro-batches.",
        _gpu_idle,
    ),
)
