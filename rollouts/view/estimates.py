"""Estimates with their uncertainty: intervals of shares and of paired differences, smoothed curves, bands. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # of a normal distribution, 97.5 %
RESAMPLES = 4000
CHUNK = 1 << 22  # numbers that are drawn at once


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, total: int) -> Interval:
    """Return a share with Wilson's score interval (Wilson 1927). `total` >= 1."""
    share, z2 = hits / total, Z95 * Z95
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = (
        Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    )
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def paired_bootstrap(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of after - before over the same rows, with the bootstrap's percentile interval over rows.

    Rows of one difference are alike, so that a resample is one draw of how often each difference comes. Equal inputs
    give equal bounds. There is at least one row.
    """
    import numpy

    differences = numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float)
    values, counts = numpy.unique(differences, return_counts=True)
    generator = numpy.random.default_rng(seed)
    total = len(differences)
    at_once = max(1, CHUNK // len(values))
    means: list[float] = []
    while len(means) < RESAMPLES:
        drawn = generator.multinomial(
            total, counts / total, size=min(at_once, RESAMPLES - len(means))
        )
        means.extend((drawn @ values / total).tolist())
    low, high = numpy.percentile(means, [2.5, 97.5])
    return Interval(float(differences.mean()), float(low), float(high))


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average with its start corrected: pandas' `ewm(span=span).mean()`."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


@dataclass(frozen=True)
class Band:
    """What several runs of one config logged at one step."""

    step: int
    mean: float
    low: float  # the least of the runs
    high: float  # the most
    runs: int


def band(curves: Sequence[tuple[Sequence[int], Sequence[float]]]) -> list[Band]:
    """Return mean, least and most over curves of (steps, values), for each step that any of them has."""
    at: dict[int, list[float]] = {}
    for steps, values in curves:
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    return [
        Band(step, math.fsum(found) / len(found), min(found), max(found), len(found))
        for step, found in sorted(at.items())
    ]


def thinned(count: int, most: int) -> list[int]:
    """Return at most `most` places of `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})
