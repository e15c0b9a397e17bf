"""A few cells of the matrix, others each day; `scripts/faults` runs all of them."""

import random
import time
from pathlib import Path

import pytest

from tests.faults.cells import CELLS, run_cell
from tests.faults.lab import make_shared

SAMPLE = 2
DAY = int(time.time() // 86400)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.mark.timeout(900)  # as long as all else waits for the machine
@pytest.mark.parametrize(("fault", "phase"), random.Random(DAY).sample(CELLS, SAMPLE))
def test_a_fault(fault: str, phase: str, shared: Path, tmp_path: Path) -> None:
    """Goal: no run lost, no log byte lost or doubled, no process left, no success reported that was none. Red, for what
    each assertion says, in the tests of the parts: tests/remote and tests/worker."""
    run_cell(shared, tmp_path / "cell", fault, phase)


def test_the_matrix_is_large() -> None:
    """Goal: at least fifty cells. Red with the link's faults left out: 46."""
    assert len(CELLS) == len(set(CELLS)) >= 50
