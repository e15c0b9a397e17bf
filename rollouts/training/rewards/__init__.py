"""Rewards: functions Sample -> float, or None for not scorable, that a job names by dotted path.
docs/reference/rewards.md.

`rl.reward.fn="rollouts.training.rewards.exact_match"`; `resolve` finds it. Only the
standard library is loaded here.
"""

from rollouts.data_formats.gsm8k import GSM8K_ANSWER, gsm8k_number
from rollouts.training.rewards.answer_rewards import (
    choice_letter,
    exact_match,
    gsm8k_answer,
    is_correct,
    per_letter,
    per_letter_and_exact,
    regex_answer,
    regex_format,
)
from rollouts.training.rewards.code_rewards import code_reward, code_tests, code_tests_all
from rollouts.training.rewards.math_answers import math_verify
from rollouts.training.rewards.reward_fn import RewardError, finite_or_none, is_full, resolve

__all__ = [
    "GSM8K_ANSWER",
    "RewardError",
    "choice_letter",
    "code_reward",
    "code_tests",
    "code_tests_all",
    "exact_match",
    "finite_or_none",
    "gsm8k_answer",
    "gsm8k_number",
    "is_correct",
    "is_full",
    "math_verify",
    "per_letter",
    "per_letter_and_exact",
    "regex_answer",
    "regex_format",
    "resolve",
]
