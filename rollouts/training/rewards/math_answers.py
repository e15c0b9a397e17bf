"""Rewards for mathematics by the library math-verify (extra `math`): answers that mean the same, however written."""

from rollouts.training.rewards.common import RewardError, answer_of
from rollouts.training.types import Sample


def math_verify(sample: Sample) -> float:
    r"""1.0 when the response's final answer means the row's: LaTeX (`\boxed{}`, `$...$`) or plain numbers; else 0.0.

    Comparing can take long (sympy): run it in `rl.reward_workers`, where `limits.reward_timeout_s` cuts it off; the
    library's own alarm is off, for it works in a main thread alone. Raises RewardError for an answer that holds no
    mathematics, and where the library is not installed.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise RewardError(f"math_verify: needs the package math-verify (no module {error.name!r})") from None
    expected = answer_of(sample)
    gold = parse(expected, parsing_timeout=None) or parse(f"${expected}$", parsing_timeout=None)
    if not gold:
        raise RewardError(f"answer={expected[:80]!r}: no mathematics that math-verify can read")
    return float(verify(gold, parse(sample.response, parsing_timeout=None), timeout_seconds=None))
