"""How many steps a stage makes of its rows: epochs are multiplied first in SFT and RL, and the plan says the same."""

import dataclasses
from typing import Any

import pytest

from rollouts.remote.inputs.data_files import RowCount
from rollouts.worker.builders.data import StageData, rl_steps, sft_steps
from tests.example_config import example_config, replace_at
from tests.remote.test_look_ahead import inputs
from tests.remote.test_plan import plan_for


def data(sft: int, prompts: int) -> StageData:
    empty: dict[str, Any] = {field.name: () for field in dataclasses.fields(StageData)}
    return StageData(**{**empty, "sft": [None] * sft, "prompts": [None] * prompts, "saved": None})


@pytest.mark.parametrize(
    ("rows", "per_step", "epochs", "steps"),
    [
        (100, 64, 10, 15),
        (100, 64, 1, 1),
        (64, 64, 3, 3),
        (63, 64, 2, 1),
        (7, 2, 3, 10),
        (1, 4, 1, 1),
    ],
)
def test_steps(rows: int, per_step: int, epochs: int, steps: int) -> None:
    """Goal: 100 prompts, 64 a step and 10 epochs are 15 steps, as in SFT and in the plan. Red with each epoch's rest
    thrown away first: 10 steps, 6.4 epochs."""
    changes = {
        "rl.num_epochs": epochs,
        "rl.examples_per_step": per_step,
        "sft.num_iterations": -1,
        "sft.num_epochs": epochs,
        "sft.target_examples_per_step": per_step,
        "sft.batch_size": 1,
    }
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path, value)
    assert config.rl is not None and config.sft is not None
    assert rl_steps(config.rl, data(rows, rows)) == sft_steps(config.sft, data(rows, rows)) == steps
    counts = {name: (RowCount(name, rows, "counted"),) for name in ("sft_mixture", "rl_mixture")}
    plan = plan_for(
        code=inputs(rows=counts),
        **{path.replace(".", "__"): value for path, value in changes.items()},
    )
    shown = f"{steps} step{'' if steps == 1 else 's'}"
    assert f"about {shown} " in plan.summary[0] and f": {shown}, " in plan.summary[1]
