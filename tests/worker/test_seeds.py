"""Every generator that a user's code may draw from is seeded before a stage loads anything."""

import random
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch

from rollouts.config import load_config
from rollouts.run_dir import RunDir
from rollouts.training import distributed
from rollouts.worker.stages import parts

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "00_cpu_sft_rl.py"


class Reached(Exception):
    pass


def draws(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, float]:
    """What the three generators give first, where a stage has begun to load."""

    def stop(*_: object) -> None:
        raise Reached((random.random(), float(np.random.rand()), float(torch.rand(()))))

    monkeypatch.setattr(parts, "_start_model", stop)
    monkeypatch.setattr(distributed, "initialize", lambda *_, **__: torch.device("cpu"))

    async def begin() -> None:
        async with parts.open_parts(load_config(CONFIG), RunDir(directory), "rl"):
            pass

    with pytest.raises(Reached) as reached:
        anyio.run(begin)
    return reached.value.args[0]


def test_a_stage_begins_with_the_same_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a reward or filter that draws from `random`, NumPy or torch gives the same run twice. Red with torch alone
    seeded: the draws of the two others differed."""
    first = draws(tmp_path, monkeypatch)
    random.seed(), np.random.seed(), torch.seed()
    assert draws(tmp_path, monkeypatch) == first
