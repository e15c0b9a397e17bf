"""Advantages: rewards in, one number per sample out, or with values one per token. Pure Python in double precision.

Two choices make the published methods (docs/reference/losses.md). `baseline`, what is subtracted from a reward: a
constant,
"group_mean" (the mean of the prompt's samples), or "leave_one_out" (the mean of the prompt's *other* samples). `norm`,
what the difference is divided by: "none", "group_std", or "batch", which standardises over the whole step.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

CONTRAST_MIN = 1e-6  # of the largest magnitude: rewards that lie closer are equal, but for rounding and a judge's noise
BASELINES = ("group_mean", "leave_one_out")
NORMS = ("none", "group_std", "batch")


def compute_advantages(
    rewards: Sequence[float],
    baseline: float | str = 0.5,
    *,
    group_ids: Sequence[int] | None = None,
    norm: str = "none",
) -> list[float]:
    """(reward - baseline) / norm, one per sample.

    `group_ids` names each sample's group, the prompt it answers (None: all are one group).
    GRPO (arXiv 2402.03300): "group_mean" and "group_std". Dr. GRPO (2503.20783): "group_mean". RLOO (2402.14740):
    "leave_one_out". REINFORCE++ (2501.03262): 0.0 and "batch"; its baseline variant: "group_mean" and "batch".

    Standard deviations have ddof 1 and no epsilon is added. Where there is no contrast (`has_contrast`) nothing is
    divided: a group whose rewards are equal, or of one sample, gets exactly 0 from the group baselines, never NaN or
    noise blown up; so does a whole step under "batch". Raises ValueError for an unknown name, ids that do not fit, or
    a reward that is not finite.
    """
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise ValueError(
            f"baseline={baseline!r}: needs a number or one of {', '.join(map(repr, BASELINES))}"
        )
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: needs one of {', '.join(map(repr, NORMS))}")
    ids = [0] * len(rewards) if group_ids is None else list(group_ids)
    if len(ids) != len(rewards):
        raise ValueError(f"{len(ids)} group_ids for {len(rewards)} rewards: needs one each")
    not_finite = [
        f"rewards[{place}]={str(value)[:40]}"
        for place, value in enumerate(rewards)
        if not _finite(value)
    ]
    not_finite += (
        [] if isinstance(baseline, str) or _finite(baseline) else [f"baseline={str(baseline)[:40]}"]
    )
    if not_finite:
        raise ValueError(
            f"{', '.join(not_finite[:5])}: needs finite rewards, and a finite baseline"
        )
    places: dict[int, list[int]] = {}
    for place, group in enumerate(ids):
        places.setdefault(group, []).append(place)
    if norm == "batch":  # the result does not depend on the scale
        scale = _scale(rewards if isinstance(baseline, str) else (*rewards, baseline))
        rewards = [reward / scale for reward in rewards]
        baseline = baseline if isinstance(baseline, str) else baseline / scale
    advantages = [0.0] * len(rewards)
    for members in places.values():
        of_group = _of_group(
            [rewards[place] for place in members], baseline, divide=norm == "group_std"
        )
        for place, advantage in zip(members, of_group, strict=True):
            advantages[place] = advantage
    if not all(map(math.isfinite, advantages)):
        raise ValueError(
            f"rewards of up to {max(map(abs, rewards))}: what is left of the baseline is beyond any float"
        )
    if norm != "batch":
        return advantages
    # what the differences were rounded at
    beside = () if isinstance(baseline, str) else (*rewards, baseline)
    return _standardised(advantages, beside)


def _finite(value: float) -> bool:
    """Return whether a number fits into a float, and is one: an integer may be too large."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def has_contrast(values: Sequence[float], beside: Iterable[float] = ()) -> bool:
    """Return whether `values` differ by more than CONTRAST_MIN of the largest magnitude among them and `beside`."""
    scale = max(map(abs, (*values, *beside)), default=0.0)
    return scale > 0 and max(values) / scale - min(values) / scale > CONTRAST_MIN


def gae(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Generalized advantage estimation (arXiv 1506.02438 eq. 16) over one episode's actions: (advantages, returns).

    A_t = sum over l >= 0 of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last
    action; the return, what V_t is trained towards, is A_t + V_t. `rewards` has one number per action: for a reward of
    the whole response 0 but for the last, a penalty per token added where there is one. lam 1 and values 0 give each
    action the discounted sum of what follows. Raises ValueError where the two differ in length.
    """
    advantages = [0.0] * len(values)
    next_value = next_advantage = 0.0
    for t, (reward, value) in reversed(list(enumerate(zip(rewards, values, strict=True)))):
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        advantages[t] = next_advantage
    return advantages, [
        advantage + value for advantage, value in zip(advantages, values, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """Return the mean, which no sum of large values overflows."""
    scale = _scale(values)
    return statistics.fmean(value / scale for value in values) * scale


def standard_deviation(values: Sequence[float], *, ddof: int) -> float:
    """sqrt(sum((x - mean)²) / (n - ddof)), n > ddof; `statistics` takes 20 times as long, in fractions.

    Deviations are divided by the largest before they are squared: no square overflows, or vanishes.
    """
    middle = mean(values)
    deviations = [value - middle for value in values]
    scale = _scale(deviations)
    return scale * math.sqrt(
        math.fsum((part / scale) ** 2 for part in deviations) / (len(values) - ddof)
    )


def _scale(values: Iterable[float]) -> float:
    """Return a power of two near the largest magnitude, by which division rounds nothing; 1 for zeros."""
    largest = max(map(abs, values), default=0.0)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 1.0


def _of_group(rewards: Sequence[float], baseline: float | str, *, divide: bool) -> list[float]:
    contrast = has_contrast(rewards)
    # the result does not depend on the scale, and squares and means round less
    if contrast and divide:
        scale = _scale(rewards)
        rewards, baseline = (
            [reward / scale for reward in rewards],
            baseline if isinstance(baseline, str) else baseline / scale,
        )
    if not isinstance(baseline, str):
        differences = [reward - baseline for reward in rewards]
    elif not contrast:
        return [0.0] * len(rewards)
    elif baseline == "group_mean":
        middle = mean(rewards)
        differences = [reward - middle for reward in rewards]
    else:
        middle, share = mean(rewards), len(rewards) / (len(rewards) - 1)
        # what is left by the mean of the others
        differences = [(reward - middle) * share for reward in rewards]
    return _over_deviation(differences, rewards) if contrast and divide else differences


def _standardised(values: Sequence[float], beside: Iterable[float]) -> list[float]:
    if not has_contrast(values, beside):
        return [0.0] * len(values)
    middle = mean(values)
    return _over_deviation([value - middle for value in values], values)


def _over_deviation(differences: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return `differences` over the standard deviation (ddof 1) of `values`."""
    std = standard_deviation(values, ddof=1)
    return [difference / std for difference in differences]
