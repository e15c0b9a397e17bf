"""What a step's rollouts were like: the numbers that are logged, and the record of every sample."""

import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from rollouts.training.advantages import has_contrast, mean, standard_deviation
from rollouts.training.metrics import MetricsLogger
from rollouts.training.replay import sample_records
from rollouts.training.types import RolloutBatch, Sample


def rollout_metrics(batch: RolloutBatch, steps_applied: int | None) -> dict[str, float]:
    """Return statistics of a step's rollouts: rewards, lengths, the age of their weights.

    "lag_mean" and "lag_max" count optimizer steps: from the oldest weights that sampled a token of each sample to the
    `steps_applied` by now (None: nothing is trained, so there is no lag). "partial_frac" is the share of samples that
    more than one version sampled. The numbers of `batch.metadata` (groups started, kept, dropped) keep their names;
    counts by filter are `<key>_<filter>`, beside their sum.
    """
    metrics: dict[str, float] = {
        # of kept groups; batch.metadata may know of all
        "groups_zero_std_frac": _zero_std_frac(batch),
        "reward_mean": mean(batch.rewards),
        "reward_std": standard_deviation(batch.rewards, ddof=0),
        "response_length_mean": statistics.fmean(batch.response_lengths),
    }
    reasons = [sample.metadata.get("finish_reason") for sample in batch.samples]
    if reasons:
        metrics["truncated_frac"] = sum(map(_is_length, reasons)) / len(reasons)
    oldest = [version for version in map(_oldest_version, batch.samples) if version is not None]
    if oldest and steps_applied is not None:
        metrics |= {
            "lag_mean": steps_applied - statistics.fmean(oldest),
            "lag_max": steps_applied - min(oldest),
        }
        metrics["partial_frac"] = sum(
            "weight_versions" in sample.metadata for sample in batch.samples
        ) / len(oldest)
    for key, value in batch.metadata.items():
        if isinstance(value, Mapping):  # groups_dropped: by filter, and their sum
            metrics |= {
                key: sum(value.values()),
                **{f"{key}_{name}": count for name, count in value.items()},
            }
        elif isinstance(value, (int, float)):
            metrics[key] = value
    return metrics


def _zero_std_frac(batch: RolloutBatch) -> float:
    groups: dict[int, list[float]] = {}
    for group, reward in zip(
        batch.group_ids or [0] * len(batch.rewards), batch.rewards, strict=True
    ):
        groups.setdefault(group, []).append(reward)
    return sum(not has_contrast(rewards) for rewards in groups.values()) / len(groups)


def _oldest_version(sample: Sample) -> int | None:
    """Return how many steps the first weights that sampled a token were trained for; None for other version names."""
    spans = sample.metadata.get("weight_versions")
    version = spans[0]["version"] if spans else sample.metadata.get("weight_version")
    return int(version) if version is not None and str(version).isdigit() else None


def _is_length(reason: object) -> bool:
    return reason == "length" or (isinstance(reason, Mapping) and reason.get("type") == "length")


def log_samples(
    logger: MetricsLogger,
    batch: RolloutBatch,
    advantages: Sequence[float] | None,
    step: int,
    temperature: float,
    *,
    trainer: Tensor | None = None,
) -> None:
    """Log every sample of a step, with all that training on it again needs, and the trainer's log-probs [B, T]."""
    for record in sample_records(batch, advantages, temperature, trainer):
        logger.log(record, step=step)
