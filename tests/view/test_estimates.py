"""Estimates against scipy and pandas."""

import random

import numpy
import pandas
import pytest
from scipy import stats

from rollouts.view.estimates import band, paired_bootstrap, smoothed, thinned, wilson


@pytest.mark.parametrize(
    ("hits", "total"), [(0, 1), (1, 1), (0, 60), (24, 60), (60, 60), (499, 500)]
)
def test_wilson(hits: int, total: int) -> None:
    """Goal: the interval is scipy's. Red with the plain normal interval."""
    expected = stats.binomtest(hits, total).proportion_ci(method="wilson")
    found = wilson(hits, total)
    assert (found.value, found.low, found.high) == pytest.approx(
        (hits / total, expected.low, expected.high)
    )


@pytest.mark.parametrize("right", [False, True], ids=["rewards", "right or wrong"])
def test_paired_bootstrap(right: bool) -> None:
    """Goal: mean and bounds are those of scipy's percentile bootstrap over pairs, within what resampling leaves open;
    the same input gives the same bounds. Red with rows resampled apart from their partners."""
    draw = random.Random(0)
    before = [draw.random() for _ in range(200)]
    after = [value + 0.1 * draw.random() for value in before]
    if right:
        before, after = (
            [float(value > 0.5) for value in before],
            [float(value > 0.5) for value in after],
        )
    found = paired_bootstrap(before, after)
    differences = numpy.array(after) - numpy.array(before)
    expected = stats.bootstrap(
        (differences,),
        numpy.mean,
        method="percentile",
        n_resamples=20_000,
        rng=numpy.random.default_rng(1),
    ).confidence_interval
    width = expected.high - expected.low
    assert found.value == pytest.approx(differences.mean())
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    assert paired_bootstrap(before, after) == found and found.low < found.value < found.high


def test_smoothed() -> None:
    """Goal: the curve is pandas' moving average. Red without the correction of its start."""
    values = [random.Random(0).random() for _ in range(50)]
    assert smoothed(values, 7.5) == pytest.approx(list(pandas.Series(values).ewm(span=7.5).mean()))
    assert smoothed([], 3) == [] and smoothed(values, 1) == values


def test_band() -> None:
    """Goal: mean, least and most at each step are those that pandas groups, where runs have different steps. Red with
    steps that all runs share alone."""
    curves = [((1, 2, 3), (0.1, 0.4, 0.9)), ((1, 2), (0.3, 0.2)), ((2, 3), (0.7, 0.1))]
    frame = pandas.DataFrame(
        [(s, v) for steps, values in curves for s, v in zip(steps, values, strict=True)],
        columns=["step", "value"],
    )
    expected = frame.groupby("step").value.agg(["mean", "min", "max", "count"])
    found = [(item.mean, item.low, item.high, item.runs) for item in band(curves)]
    assert numpy.array(found) == pytest.approx(expected.to_numpy())
    assert [item.step for item in band(curves)] == list(expected.index)


def test_thinned_keeps_both_ends() -> None:
    """Goal: no more than asked for, in order, the last point among them. Red with every k-th."""
    for count, most in ((3, 10), (10, 3), (1001, 500), (2, 2)):
        places = thinned(count, most)
        assert (
            len(places) <= most
            and places[0] == 0
            and places[-1] == count - 1
            and places == sorted(set(places))
        )
