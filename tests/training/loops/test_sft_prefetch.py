"""The SFT loop prepares its next batches in a thread: what it and a resumed run train on stays exact."""

import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest

from rollouts.training.checkpoint import latest_checkpoint
from rollouts.training.loops import run_sft_training
from rollouts.training.types import Sample, SFTTrainingConfig
from tests.training.tiny import PAD, sft_samples, tiny_backend

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIG = {
    "num_steps": 6,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 1,
    "micro_batch_size": 3,
}
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import anyio
from rollouts.training.loops import run_sft_training
from rollouts.training.types import SFTTrainingConfig
from tests.training.loops.test_sft_prefetch import CONFIG
from tests.training.tiny import PAD, sft_samples, tiny_backend

directory, kill_at = Path(sys.argv[1]), int(sys.argv[2])

class Samples(list):
    taken = 0
    def __getitem__(self, index):  # the loop takes a step's examples when it prepares the step
        self.taken += 1
        if self.taken == (kill_at - 1) * CONFIG["batch_size"] + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

async def main():
    config = SFTTrainingConfig(**CONFIG)
    await run_sft_training(tiny_backend(directory), Samples(sft_samples(10)), config, seed=7, pad_token_id=PAD)

anyio.run(main)
"""


class Watched(list[Sample]):
    """Remembers which thread took which example, and fails at one."""

    def __init__(self, samples: list[Sample], fail_at: int = -1) -> None:
        super().__init__(samples)
        self.taken: list[str] = []
        self.fail_at = fail_at

    def __getitem__(self, index):
        self.taken.append(threading.current_thread().name)
        if len(self.taken) == self.fail_at:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_a_run_killed_while_it_prepares_resumes_bit_for_bit(tmp_path):
    """Goal: the cursor counts trained steps alone. Killed while step 5 is prepared, which is before step 4 trains.

    Red with the cursor at the newest prepared step: steps were left out and the weights differ.
    """

    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed"), "5"]
    assert subprocess.run(command, cwd=REPOSITORY, check=False, timeout=200).returncode == -9
    newest = latest_checkpoint(tmp_path / "killed")
    assert newest is not None and newest.name in ("step_000001", "step_000002", "step_000003")

    async def train(directory: Path, resume_from: Path | None) -> None:
        backend = tiny_backend(directory, seed=0 if resume_from is None else 99)
        resume = None if resume_from is None else await backend.load_checkpoint(resume_from)
        config = SFTTrainingConfig(**CONFIG)
        await run_sft_training(
            backend, sft_samples(10), config, seed=7, pad_token_id=PAD, resume=resume
        )

    anyio.run(train, tmp_path / "killed", newest)
    anyio.run(train, tmp_path / "whole", None)
    killed = (tmp_path / "killed" / "latest" / "model.safetensors").read_bytes()
    assert killed == (tmp_path / "whole" / "latest" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_batches_are_prepared_beside_training_and_fail_at_their_step(tmp_path, runtime):
    """Goal: not in the event loop; a failure ends the run at its step, with the steps before it trained and saved.

    Red with the batch made in the loop (MainThread), and with the failure raised as soon as it happened.
    """
    samples = Watched(sft_samples(10), fail_at=3 * 4 + 2)  # in step 4 of 6
    backend = tiny_backend(tmp_path)

    async def main():
        await run_sft_training(
            backend, samples, SFTTrainingConfig(**CONFIG), seed=7, pad_token_id=PAD
        )

    with pytest.raises(OSError, match="the disk is gone"):
        anyio.run(main, backend=runtime)
    assert len(set(samples.taken)) == 1 and samples.taken[0].startswith("prefetch")
    assert latest_checkpoint(tmp_path).name == "step_000003"
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")
    ]
