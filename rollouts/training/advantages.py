"""Advantages: rewards in, one number per sample out, or with values one per token. Pure Python in double precision.

Two choices make the published methods (docs/losses.md). `baseline`, what is subtracted from a reward: a constant,
"group_mean" (the mean of the prompt's samples), or "leave_one_out" (the mean of the prompt's *other* samples). `norm`,
what the difference is divided by: "none", "group_std", or "batch", which standardises over the whole step.
"""

import math
import statistics
from collections.abc import Sequence

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

    Standard deviations have ddof 1 and no epsilon is added. Where there is no contrast nothing is divided: a group
    whose rewards are all equal, or of one sample, gets exactly 0 from the group baselines, never NaN or rounding noise
    blown up; so does a whole step under "batch". Raises ValueError for an unknown name or ids that do not fit.
    """
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: needs a number or one of {', '.join(map(repr, BASELINES))}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: needs one of {', '.join(map(repr, NORMS))}")
    ids = [0] * len(rewards) if group_ids is None else list(group_ids)
    if len(ids) != len(rewards):
        raise ValueError(f"{len(ids)} group_ids for {len(rewards)} rewards: needs one each")
    places: dict[int, list[int]] = {}
    for place, group in enumerate(ids):
        places.setdefault(group, []).append(place)
    advantages = [0.0] * len(rewards)
    for members in places.values():
        of_group = _of_group([rewards[place] for place in members], baseline, divide=norm == "group_std")
        for place, advantage in zip(members, of_group, strict=True):
            advantages[place] = advantage
    return _standardised(advantages) if norm == "batch" else advantages


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
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def standard_deviation(values: Sequence[float], *, ddof: int) -> float:
    """sqrt(sum((x - mean)²) / (n - ddof)), n > ddof; `statistics` takes 20 times as long, in fractions."""
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - ddof))


def _of_group(rewards: Sequence[float], baseline: float | str, *, divide: bool) -> list[float]:
    flat = _all_equal(rewards)  # compared, for a rounded mean may differ from all
    if not isinstance(baseline, str):
        differences = [reward - baseline for reward in rewards]
    elif flat:
        return [0.0] * len(rewards)
    elif baseline == "group_mean":
        mean = statistics.fmean(rewards)
        differences = [reward - mean for reward in rewards]
    else:
        total, others = math.fsum(rewards), len(rewards) - 1
        differences = [reward - (total - reward) / others for reward in rewards]
    if flat or not divide:
        return differences
    std = standard_deviation(rewards, ddof=1)
    return [difference / std for difference in differences]


def _standardised(values: Sequence[float]) -> list[float]:
    if _all_equal(values):
        return [0.0] * len(values)
    mean, std = statistics.fmean(values), standard_deviation(values, ddof=1)
    return [(value - mean) / std for value in values]


def _all_equal(values: Sequence[float]) -> bool:
    return all(value == values[0] for value in values)
