"""Group filters keep and drop as their names say, and refuse to run before rewards."""

import pytest

from rollouts.training.filters import (
    check_any_success,
    check_min_reward,
    check_quality_and_diversity,
    check_response_diversity,
    check_reward_nonzero_std,
)
from rollouts.training.types import Sample

ALL = (
    check_reward_nonzero_std,
    check_min_reward,
    check_response_diversity,
    check_quality_and_diversity,
    check_any_success,
)


def group(rewards: list[float | None], responses: str = "") -> list[Sample]:
    letters = responses or "abcdefgh"[: len(rewards)]
    return [
        Sample(prompt="q", response=text, reward=reward)
        for text, reward in zip(letters, rewards, strict=True)
    ]


@pytest.mark.parametrize(
    ("filter_fn", "rewards", "responses", "kept"),
    [
        (check_reward_nonzero_std, [0.0, 1.0], "ab", True),
        (check_reward_nonzero_std, [1.0, 1.0], "ab", False),
        # its standard deviation in floats is not 0
        (check_reward_nonzero_std, [0.1, 0.1, 0.1], "abc", False),
        (check_reward_nonzero_std, [1.0], "a", False),
        # rounding; red with a set of the rewards
        (check_reward_nonzero_std, [0.1 + 0.2, 0.3, 0.3], "abc", False),
        (check_reward_nonzero_std, [0.5, 0.5 + 1e-7], "ab", False),  # a judge's noise
        (check_reward_nonzero_std, [0.5, 0.501], "ab", True),
        (check_reward_nonzero_std, [0.0, 1e-30], "ab", True),
        (check_any_success, [0.0, sum([0.1] * 10)], "ab", True),  # 0.9999999999999999
        (check_min_reward, [0.0, 0.5 + 1e-12], "ab", False),
        (check_min_reward, [0.0, 0.6], "ab", True),
        (check_min_reward, [0.0, 0.5], "ab", False),
        (check_response_diversity, [0.0] * 4, "aabb", True),
        (check_response_diversity, [0.0] * 4, "aaab", True),
        (check_response_diversity, [0.0] * 4, "aaaa", False),
        (check_quality_and_diversity, [0.0, 1.0, 0.0, 0.0], "abcd", True),
        (check_quality_and_diversity, [0.0, 1.0, 0.0, 0.0], "aaaa", False),
        (check_quality_and_diversity, [0.0] * 4, "abcd", False),
        (check_any_success, [0.0, 1.0], "ab", True),
        (check_any_success, [0.0, 0.9], "ab", False),
    ],
)
def test_filter_keeps_or_drops(filter_fn, rewards, responses, kept):
    """Goal: each filter's rule, at its edges. Red with the comparison of any one of them turned round."""
    assert filter_fn(group(rewards, responses)) is kept


@pytest.mark.parametrize("filter_fn", [f for f in ALL if f is not check_response_diversity])
def test_filters_refuse_to_run_before_rewards(filter_fn):
    """Goal: a missing reward is an error, not a dropped group in an endless loop. Red with `reward or 0.0`."""
    with pytest.raises(ValueError, match="1 of 2 samples of a group have reward=None"):
        filter_fn(group([1.0, None]))


@pytest.mark.parametrize("filter_fn", ALL)
def test_an_empty_group_is_an_error(filter_fn):
    """Goal: nothing to judge is said so. Red without the check: a ZeroDivisionError, or a quiet False."""
    with pytest.raises(ValueError, match="empty group"):
        filter_fn([])


def test_diversity_compares_the_response_tokens():
    """Goal: equal texts of different tokens differ, and the prompt does not count. Red when comparing all tokens."""

    def sample(prompt: int, token: int) -> Sample:
        return Sample(
            prompt="q",
            response="x",
            tokens=[prompt, token],
            loss_mask=[0.0, 1.0],
            response_length=1,
        )

    assert check_response_diversity([sample(1, 5), sample(1, 6)], min_unique_ratio=1.0)
    assert not check_response_diversity([sample(1, 5), sample(2, 5)], min_unique_ratio=1.0)
