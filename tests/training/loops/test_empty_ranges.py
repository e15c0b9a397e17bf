"""Steps and sizes that leave nothing to do are errors, not successes: both numbers and the fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.training.loops import collect_rollouts, run_rl_training, run_sft_training
from rollouts.training.loops.train_step import StepsError
from rollouts.training.metrics import CompositeLogger
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig
from tests.training.tiny import sft_samples, tiny_backend

RESUMED = {"step": 3, "extra": {}}


async def sft(directory: Path, **options: Any) -> Any:
    resume = options.pop("resume", None)
    config = SFTTrainingConfig(**{"num_steps": 1, "batch_size": 2, **options})
    return await run_sft_training(tiny_backend(directory), sft_samples(4), config, resume=resume)


async def rl(directory: Path, **options: Any) -> Any:
    resume = options.pop("resume", None)
    config = RLTrainingConfig(**{"num_steps": 1, **options})
    return await run_rl_training(tiny_backend(directory), None, None, [], config, resume=resume)


async def collect(directory: Path, **options: Any) -> Any:
    return await collect_rollouts(None, options["num_steps"], CompositeLogger([]))


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        *(
            (train, {"num_steps": number}, f"num_steps={number}: needs >= 1")
            for train in (sft, rl, collect)
            for number in (0, -1)
        ),
        *(
            (
                train,
                {"num_steps": number, "resume": RESUMED},
                rf"step 3 and num_steps={number}: no step is left.*> 3",
            )
            for train in (sft, rl)
            for number in (2, 3)
        ),
        *(
            (train, {"micro_batch_size": 0}, "micro_batch_size=0: needs >= 1")
            for train in (sft, rl)
        ),
        *(
            (train, {"micro_batch_tokens": -5}, "micro_batch_tokens=-5: needs >= 1")
            for train in (sft, rl)
        ),
        *((train, {"log_every": 0}, "log_every=0: needs >= 1, or -1") for train in (sft, rl)),
        *(
            (train, {"checkpoint_every": -2}, "checkpoint_every=-2: needs >= 1, or -1")
            for train in (sft, rl)
        ),
        *(
            (train, {"num_steps": 1.5}, "num_steps=1.5: needs a whole number")
            for train in (sft, rl)
        ),
        (rl, {"sync_every": 0}, "sync_every=0: needs >= 1"),
        (sft, {"batch_size": 2.0}, "batch_size=2.0: needs a whole number"),
        (sft, {"batch_size": 0}, "batch_size=0: needs >= 1"),
        (rl, {"updates_per_batch": 0}, "updates_per_batch=0: needs >= 1"),
    ],
)
def test_nothing_to_do_is_an_error(
    tmp_path: Path, train: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    """Goal: an error before any work. Red without the check: [] came back, 0 counted as None, as -1, or max() of
    nothing."""
    with pytest.raises(StepsError, match=message):
        anyio.run(lambda: train(tmp_path, **options))
