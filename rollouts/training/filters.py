"""Group filters: they take the samples of one prompt with their rewards, and return whether the group is trained on.

Pure. Rewards are compared up to rounding (`advantages.CONTRAST_MIN`): parts that add up to 0.9999999999999999 are 1.
Filters run after rewards, so a sample without one is an error: keeping it would train on noise, dropping it would drop
every group.
"""

from rollouts.training.advantages import CONTRAST_MIN, has_contrast
from rollouts.training.types import Sample


def check_reward_nonzero_std(samples: list[Sample]) -> bool:
    """Keep a group whose rewards differ (DAPO, arXiv 2503.14476); with equal rewards all advantages are 0.

    By `advantages.has_contrast`: rounding noise is not a difference.
    """
    return has_contrast(_rewards(samples))


def check_min_reward(samples: list[Sample], threshold: float = 0.5) -> bool:
    """Keep a group in which at least one reward is above `threshold`."""
    return max(_rewards(samples)) > threshold + CONTRAST_MIN * abs(threshold)


def check_response_diversity(samples: list[Sample], min_unique_ratio: float = 0.5) -> bool:
    """Keep a group of which at least the share `min_unique_ratio` of the responses are different ones.

    Responses are compared by their tokens, or by their text where a sample has no tokens.
    """
    if not samples:
        raise ValueError("a filter got an empty group; it needs the samples of one prompt")
    responses = {_response(sample) for sample in samples}
    return len(responses) / len(samples) >= min_unique_ratio


def check_quality_and_diversity(samples: list[Sample]) -> bool:
    """Keep a group that passes both `check_reward_nonzero_std` and `check_response_diversity`."""
    return check_reward_nonzero_std(samples) and check_response_diversity(samples)


def check_any_success(samples: list[Sample], success_reward: float = 1.0) -> bool:
    """Keep a group in which at least one sample reached `success_reward`."""
    return max(_rewards(samples)) >= success_reward - CONTRAST_MIN * abs(success_reward)


def _rewards(samples: list[Sample]) -> list[float]:
    if not samples:
        raise ValueError("a filter got an empty group; it needs the samples of one prompt")
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    if len(rewards) < len(samples):
        raise ValueError(
            f"{len(samples) - len(rewards)} of {len(samples)} samples of a group have reward=None: "
            "filters run after rewards, so score every sample first"
        )
    return rewards


def _response(sample: Sample) -> str | tuple[int, ...]:
    if sample.response_length:
        return tuple(sample.tokens[-sample.response_length :])
    return sample.response
