"""The proof that an engine serves the trainer's weights."""

import math

import pytest

from rollouts.training.weights.proof import disagreement, probe_ids

OURS = [-3.0, -2.0, -4.0]


@pytest.mark.parametrize(
    ("served", "dtype", "before", "words"),
    [
        ([-3.0, -2.0, -4.0], "float32", None, None),
        ([-3.0002, -2.0, -4.0001], "float32", None, None),  # rounding
        ([-3.0, -2.0, -4.1], "float32", None, "differ from the trainer's by 0.0333"),
        ([-3.0, -2.0, -4.1], "bfloat16", None, None),
        ([-3.0, math.nan, -4.0], "float32", None, "differ from the trainer's by nan"),
        (
            [-3.0002, -2.0, -4.0],
            "float32",
            ([-3.0002, -2.0, -4.0], [-3.0002, -2.0, -4.0]),
            "are those of the weights before",
        ),
        # neither moved: a sync without a step
        ([-3.0, -2.0, -4.0], "float32", (OURS, [-3.0, -2.0, -4.0]), None),
        ([-3.0001, -2.0, -4.0], "float32", ([-3.0002, -2.0, -4.0], [-3.0002, -2.0, -4.0]), None),
    ],
)
def test_disagreement(served, dtype, before, words) -> None:
    """Goal: other weights, none, and those of the sync before are told apart from rounding. Red for nan with `mean >
    tolerance`, and for small steps without the comparison with before.
    """
    problem = disagreement(OURS, served, dtype, before=before)
    assert problem is None if words is None else words in (problem or "")


def test_the_probe_is_fixed() -> None:
    """Goal: log-probs of two syncs, and of two runs, can be compared. Red with the global generator."""
    assert (
        probe_ids(50) == probe_ids(50) and max(probe_ids(50)) < 50 and len(set(probe_ids(50))) > 8
    )
