"""Advantages against the published vectors, and where there is no contrast to learn from."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.training.advantages import compute_advantages, gae

THIRD = 2 / 3
GRPO, DR_GRPO, RLOO, REINFORCE_PP, REINFORCE_PP_BASELINE = (
    {"baseline": "group_mean", "norm": "group_std"},
    {"baseline": "group_mean"},
    {"baseline": "leave_one_out"},
    {"baseline": 0.0, "norm": "batch"},
    {"baseline": "group_mean", "norm": "batch"},
)
METHODS = [GRPO, DR_GRPO, RLOO, REINFORCE_PP, REINFORCE_PP_BASELINE]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, -0.5, -0.5, 0.5, 0.5, 0.5]),
        ({"baseline": 0.25}, [0.75, -0.25, -0.25, 0.75, 0.75, 0.75]),
        (GRPO, [0.8660254, -0.8660254, -0.8660254, 0.8660254, 0.0, 0.0]),
        (DR_GRPO, [0.5, -0.5, -0.5, 0.5, 0.0, 0.0]),
        (RLOO, [THIRD, -THIRD, -THIRD, THIRD, 0.0, 0.0]),
        # mean 2/3, squared deviations 4 x 1/9 + 2 x 4/9 = 4/3, over 5: std .5163978
        (REINFORCE_PP, [0.6454972, -1.2909944, -1.2909944, 0.6454972, 0.6454972, 0.6454972]),
        # of ±.5 and two zeros: std sqrt(1/5)
        (REINFORCE_PP_BASELINE, [1.1180340, -1.1180340, -1.1180340, 1.1180340, 0.0, 0.0]),
    ],
)
def test_advantage_vectors(options, expected):
    """Goal: rewards [1,0,0,1 | 1,1] give the published vectors. Red with ddof 0: ±1 in place of ±.8660 (trl#5773).

    And red with RLOO's own reward left in its baseline (±.5), and with "batch" not centred.
    """
    advantages = compute_advantages(
        [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], group_ids=[0, 0, 0, 0, 1, 1], **options
    )
    assert isinstance(advantages, list)
    assert advantages == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("options", METHODS)
def test_advantages_without_contrast_are_exactly_zero(options):
    """Goal: a single sample, or equal rewards whose mean rounds, give 0, not NaN or noise blown up by a tiny std.

    Red with statistics.stdev of one sample (an error), and with mean([.1] * 3) in place of .1.
    """
    for rewards in ([0.1], [0.1] * 3, [0.7] * 7):
        assert compute_advantages(rewards, **options) == [0.0] * len(rewards)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5, 1.0])), min_size=1, max_size=24
    )
)
def test_groups_are_independent_and_order_does_not_matter(pairs):
    """Goal: a group's advantages are its own, wherever its samples stand. Red with all samples taken as one group.

    And RLOO is n / (n - 1) times the difference to the group's mean; "batch" has mean 0 and std 1.
    """
    ids, rewards = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    groups = {group: [r for g, r in pairs if g == group] for group in ids}
    for options in (GRPO, DR_GRPO, RLOO, {"baseline": 0.25}):
        found = compute_advantages(rewards, group_ids=ids, **options)
        for group, members in groups.items():
            alone = compute_advantages(members, **options)
            assert [a for a, g in zip(found, ids, strict=True) if g == group] == pytest.approx(
                alone, abs=1e-12
            )
    mean_based = compute_advantages(rewards, group_ids=ids, **DR_GRPO)
    sizes = [len(groups[group]) for group in ids]
    scaled = [a * n / max(1, n - 1) for a, n in zip(mean_based, sizes, strict=True)]
    assert compute_advantages(rewards, group_ids=ids, **RLOO) == pytest.approx(scaled, abs=1e-12)
    whitened = compute_advantages(rewards, group_ids=ids, **REINFORCE_PP)
    assert all(map(math.isfinite, whitened))
    if any(whitened):
        assert statistics.fmean(whitened) == pytest.approx(0, abs=1e-9)
        assert statistics.stdev(whitened) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"baseline": "mean"},
            "baseline='mean': needs a number or one of 'group_mean', 'leave_one_out'",
        ),
        ({"norm": "std"}, "norm='std': needs one of 'none', 'group_std', 'batch'"),
        ({"group_ids": [0]}, "1 group_ids for 2 rewards"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """Goal: a misspelt baseline is no silent constant. Red with the checks off: a TypeError about str and float."""
    with pytest.raises(ValueError, match=message):
        compute_advantages([1.0, 0.0], **arguments)


NUMBERS = st.floats(-3, 3, width=32)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=9),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_gae_is_the_sum_over_all_later_surprises(pairs, gamma, lam):
    """Goal: eq. 16 of 1506.02438 written out in full. Red with the value after the last action taken as V_T.

    Red also with next_value updated before it is used.
    """
    rewards, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    deltas = [
        r + gamma * following - v
        for r, v, following in zip(rewards, values, [*values[1:], 0.0], strict=True)
    ]
    expected = [
        sum((gamma * lam) ** later * delta for later, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam)
    assert advantages == pytest.approx(expected, abs=1e-9)
    assert returns == pytest.approx(
        [a + v for a, v in zip(expected, values, strict=True)], abs=1e-9
    )


def test_gae_without_values_is_the_reward():
    """Goal: gamma = lam = 1 and values 0 give each token the response's reward, as REINFORCE does. Red with lam 0.95.

    With a value, lam 1 is the reward less the value; a penalty per token counts for it and all before it.
    """
    assert gae([0.0, 0.0, 0.7], [0.0] * 3, gamma=1.0, lam=1.0) == ([0.7] * 3, [0.7] * 3)
    assert gae([0.0, 1.0], [0.25, 0.5], gamma=1.0, lam=1.0) == ([0.75, 0.5], [1.0, 1.0])
    assert gae([-0.1, 1.0], [0.0, 0.0], gamma=0.5, lam=1.0)[0] == pytest.approx([-0.1 + 0.5, 1.0])
    with pytest.raises(ValueError):
        gae([1.0], [0.0, 0.0], gamma=1.0, lam=1.0)


SUM = 0.1 + 0.2  # 0.30000000000000004


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize(
    "rewards",
    [
        [SUM, 0.3, 0.3, 0.3],
        [0.3 + 1e-7, 0.3, 0.3 - 5e-8, 0.3],
        [-SUM, -0.3],
        [1e6 + 1e-4, 1e6, 1e6],
        [math.fsum([0.1] * 10), sum([0.1] * 10)],
        [1e200, 1e200 * (1 + 1e-12)],
        [5e-324, 5e-324],
    ],
)
def test_rounding_and_a_judges_noise_are_no_contrast(options, rewards):
    """Goal: rewards that differ by less than 1e-6 of the largest are equal: 0. Red with ==: 1.73 for 0.1 + 0.2 against
    0.3, and a gradient of norm 1 out of it."""
    assert compute_advantages(rewards, **options) == [0.0] * len(rewards)


@pytest.mark.parametrize("scale", [1e-323, math.exp(-400), 1e-9, 1.0, 1e200, 1e307])
@pytest.mark.parametrize("norm", ["group_std", "batch"])
def test_contrast_of_any_size_is_standardised(scale, norm):
    """Goal: [a, 0, 0, 0] gives (1.5, -.5, -.5, -.5), exactly by hand, however small or large a is. Red with squares of
    the deviations as they are: ZeroDivisionError at exp(-400), OverflowError at 1e200."""
    advantages = compute_advantages([scale, 0.0, 0.0, 0.0], "group_mean", norm=norm)
    assert advantages == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-9 if scale > 1e-300 else 0.3)
    assert abs(sum(advantages)) < 1e-9 or scale < 1e-300
    both = compute_advantages([scale, scale, -scale, -scale], "group_mean", norm=norm)
    assert both == pytest.approx([math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2)


def test_a_constant_baseline_near_the_rewards_shows_no_noise():
    """Goal: what is left of 0.3 less 0.3 is rounding. Red with contrast looked for among the differences alone: ±1."""
    assert compute_advantages([SUM, 0.3, 0.3], 0.3, norm="batch") == [0.0] * 3
    assert compute_advantages([0.3 + 1e-3, 0.3, 0.3], 0.3, norm="batch") == pytest.approx(
        [2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)], rel=1e-9
    )


def test_small_but_real_contrast_stays():
    """Goal: a penalty of a thousandth counts. Red with a threshold of 1e-2."""
    assert compute_advantages([1.0, 0.999], "group_mean", norm="group_std") == pytest.approx(
        [math.sqrt(0.5), -math.sqrt(0.5)]
    )
    assert compute_advantages([1.0, 1.0 - 1e-5], "group_mean") != [0.0, 0.0]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(reward):
    """Goal: the place, not NaN for the whole group. Red without the check."""
    with pytest.raises(ValueError, match=rf"rewards\[1\]={reward}: needs finite"):
        compute_advantages([0.0, reward], "group_mean", norm="group_std")


@pytest.mark.parametrize(
    ("rewards", "baseline", "named"),
    [
        ([10**400, 0.0], "group_mean", r"rewards\[0\]=1000"),
        ([1.0, 2.0], math.nan, "baseline=nan"),
        ([1.0, 2.0], math.inf, "baseline=inf"),
        ([1.7e308, -1.7e308], -1.7e308, r"rewards of up to 1.7e\+308: .* beyond any float"),
    ],
)
def test_what_no_float_holds_is_named(rewards, baseline, named):
    """Goal: no NaN or infinity into a loss. Red as it was: OverflowError without a name, NaN, infinity."""
    with pytest.raises(ValueError, match=named):
        compute_advantages(rewards, baseline)
