"""What shows that a run learns nothing is said, each cause once, and nothing is said of a run that learns."""

import math

import pytest

from rollouts.training.alarms import STEPS, Alarms

HEALTHY = {
    "loss": 0.1,
    "grad_norm": 0.5,
    "reward_mean": 0.3,
    "groups_zero_std_frac": 0.5,
    "truncated_frac": 0.1,
}


def causes(alarms: Alarms, steps: list[dict[str, float]]) -> list[tuple[int, str]]:
    return [
        (number, alarm.cause)
        for number, metrics in enumerate(steps, 1)
        for alarm in alarms.of_step(metrics)
    ]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"loss": 0.0, "grad_norm": 0.0, "reward_mean": 0.0}, "all_zero"),
        ({"groups_zero_std_frac": 1.0}, "no_contrast"),
        ({"truncated_frac": 1.0}, "all_truncated"),
    ],
)
def test_a_cause_is_told_once_it_has_lasted(changes: dict[str, float], cause: str) -> None:
    """Goal: after five steps in a row, once, however long it goes on. Red with the streak not broken by a good step."""
    bad = {**HEALTHY, **changes}
    assert causes(Alarms(100), [bad] * 4 + [HEALTHY] + [bad] * 20) == [(4 + 1 + STEPS, cause)]
    assert causes(Alarms(2), [bad] * 2) == [(2, cause)]  # a run of fewer steps


def test_a_run_that_learns_is_left_alone() -> None:
    """Goal: zeros that are not all zero, steps without rewards (SFT) or NaN are no cause. Red with `any` for `all`."""
    steps = [
        HEALTHY,
        {**HEALTHY, "loss": 0.0, "grad_norm": 0.0},
        {"loss": 0.2, "grad_norm": 0.1},
        {"loss": math.nan},
    ]
    assert causes(Alarms(3), [step for step in steps for _ in range(10)]) == []
    assert causes(Alarms(3), [{"loss": 0.0, "grad_norm": 0.0}] * 3) == [(3, "all_zero")]  # SFT


def test_an_evaluation_that_fell_by_half() -> None:
    """Goal: against the best so far, of the stage before too; not for chance among few rows. Red with the last value
    in place of the best: it never falls by half at once."""
    alarms = Alarms(10)
    falls = [
        [alarm.message for alarm in alarms.of_evaluation(f"rl step {step}", {"exact_match": value})]
        for step, value in enumerate([0.2, 0.8, 0.6, 0.45, 0.39, 0.1])
    ]
    assert [len(found) for found in falls] == [0, 0, 0, 0, 1, 0]
    assert "fell from 0.8000 (rl step 1) to 0.3900 (rl step 4)" in falls[4][0]
    few = Alarms(10)
    assert [few.of_evaluation("rl", {"exact_match": value}) for value in (0.04, 0.0, 0.01)] == [
        [],
        [],
        [],
    ]
    assert [len(few.of_evaluation("rl", {"reward": value})) for value in (2.0, 0.5)] == [0, 1]
    assert few.of_evaluation("rl", {"validation_loss": 9.0}) == []
