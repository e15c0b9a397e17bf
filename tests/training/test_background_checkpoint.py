"""Checkpoints written while training goes on: the state they hold, failures, kills, the process's end; which stay."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file

from rollouts.training import checkpoint
from rollouts.training.backends import BackendFailedError, PyTorchTrainingBackend
from rollouts.training.checkpoint import (
    CheckpointError,
    Retention,
    latest_checkpoint,
    list_checkpoints,
)
from rollouts.training.loops import run_sft_training
from rollouts.training.loops.train_step import train_step
from rollouts.training.retention import expired
from rollouts.training.rl_losses import sft_loss
from rollouts.training.types import SFTTrainingConfig
from tests.training.backends.test_pytorch import sft_batch
from tests.training.tiny import PAD, sft_samples, tiny_backend, tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Writing stands still, with the weights not yet on disk, until this is set."""
    release, write_model = threading.Event(), checkpoint.write_model

    def gated(*arguments):
        assert release.wait(200), "nothing released the writer: training waits for it"
        write_model(*arguments)

    monkeypatch.setattr(checkpoint, "write_model", gated)
    return release


def state_of(backend) -> dict[str, torch.Tensor]:
    weights = {
        f"weight {name}": tensor.clone() for name, tensor in backend.model.state_dict().items()
    }
    for index, entries in backend.optimizer.state_dict()["state"].items():
        weights |= {f"{entry} {index}": value.clone() for entry, value in entries.items()}
    return weights


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_what_is_saved_is_the_state_at_its_step(tmp_path, gate, runtime):
    """Goal: steps taken while the writer runs change nothing in the file, weights or optimizer.

    Red with `copy=False` for the weights, and red with the optimizer's tensors handed over unstaged.
    """
    backend = tiny_backend(tmp_path)

    async def main():
        await train_step(backend, sft_batch(seed=1), None)
        expected = state_of(backend)
        saving = await backend.start_checkpoint(1, {"loss": 1.0}, {"cursor": 1})
        for seed in (2, 3):
            assert (await train_step(backend, sft_batch(seed=seed), None))["step"] == seed
        assert not saving.done()
        gate.set()
        path = await saving.result()
        assert not torch.equal(
            state_of(backend)["weight lm_head.weight"], expected["weight lm_head.weight"]
        )
        other = tiny_backend(tmp_path, seed=7)
        assert (await other.load_checkpoint(path))["extra"] == {"cursor": 1}
        found = state_of(other)
        assert found.keys() == expected.keys() and len(found) > 60
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    anyio.run(main, backend=runtime)


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path, gate):
    """Goal: step 3 is logged before the checkpoint of step 2 is complete, and each is reported once, when it is.

    Red with the loop awaiting save_checkpoint: the writer is never released.
    """
    seen: list[str] = []

    class Logger:
        def log(self, metrics, step):
            seen.append(f"step {step}")
            if step == 3:
                gate.set()

        def finish(self):
            """Nothing is pending."""

    def on_checkpoint(path: Path, step: int) -> None:
        assert checkpoint.read_metadata(path)["step"] == step
        seen.append(f"saved {step}")

    config = SFTTrainingConfig(num_steps=4, batch_size=4, log_every=1, checkpoint_every=2)
    backend = tiny_backend(tmp_path)

    async def main():
        samples = sft_samples(8)
        await run_sft_training(
            backend, samples, config, Logger(), pad_token_id=PAD, on_checkpoint=on_checkpoint
        )

    anyio.run(main)
    assert sorted(seen) == ["saved 2", "saved 4", "step 1", "step 2", "step 3", "step 4"]
    assert seen.index("saved 2") > seen.index("step 3")
    # the last one is complete before the last evaluation, which that row has
    assert seen[-2:] == ["saved 4", "step 4"]


def test_a_backend_of_ones_own_needs_no_more_than_the_protocol(tmp_path):
    """Goal: a backend with save_checkpoint alone works in the loop. Red with start_checkpoint taken for granted."""
    backend = tiny_backend(tmp_path)

    class Minimal:
        forward_backward, optim_step, save_checkpoint = (
            backend.forward_backward,
            backend.optim_step,
            backend.save_checkpoint,
        )

    saved: list[int] = []
    config = SFTTrainingConfig(num_steps=3, batch_size=4, log_every=1, checkpoint_every=2)

    async def main():
        on_checkpoint = lambda path, step: saved.append(step)  # noqa: E731
        await run_sft_training(
            Minimal(), sft_samples(8), config, pad_token_id=PAD, on_checkpoint=on_checkpoint
        )

    anyio.run(main)
    assert saved == [2, 3]


def test_the_next_save_waits_for_the_last(tmp_path, gate):
    """Goal: never two copies of the state in memory. Red without `before.wait()`: the second is staged at once."""
    backend = tiny_backend(tmp_path)

    async def main():
        first = await backend.start_checkpoint(1, {})
        with anyio.move_on_after(0.3) as scope:
            await backend.start_checkpoint(2, {})
        assert scope.cancelled_caught  # the wait alone: the save was submitted, and stands
        gate.set()
        third = await backend.start_checkpoint(3, {})
        assert [(await save.result()).name for save in (first, third)] == [
            "step_000001",
            "step_000003",
        ]
        assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "2", "3"]

    anyio.run(main)


def test_a_save_that_failed_surfaces_at_its_result_and_at_the_next_save(tmp_path):
    """Goal: a full disk is not noticed only when a resume needs the file. Red with the error left in its thread."""
    backend = tiny_backend(tmp_path / "rl")
    (tmp_path / "rl").write_text("a file where the directory goes")

    async def main():
        with pytest.raises(FileExistsError):
            await backend.save_checkpoint(1, {})
        await train_step(backend, sft_batch(), None)  # what failed is the file, not the training
        with pytest.raises(FileExistsError):
            await backend.save_checkpoint(2, {})
        with pytest.raises(BackendFailedError, match="save_checkpoint of this"):
            await backend.save_checkpoint(3, {})

    anyio.run(main)


CHILD = """
import sys, time
from pathlib import Path
import anyio
from rollouts.training import checkpoint
from tests.training.tiny import tiny_backend

backend = tiny_backend(Path(sys.argv[1]))
anyio.run(backend.save_checkpoint, 1, {"loss": 1.0})
write_manifest = checkpoint.write_manifest

def slow(directory):
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    return write_manifest(directory)

checkpoint.write_manifest = slow
anyio.run(backend.start_checkpoint, 2, {"loss": 0.5})
"""


def child(directory: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(directory), str(seconds)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_9_during_a_save_leaves_the_checkpoint_before(tmp_path):
    """Goal: the process is killed with all but the manifest on disk; a run resumes from step 1 and saves again.

    Red with the manifest written after the rename: `latest` is step_000002, half a checkpoint.
    """
    process = child(tmp_path, 600)
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=200)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000001"]
    assert (tmp_path / "latest").resolve().name == "step_000001"
    backend = tiny_backend(tmp_path, seed=4)

    async def main():
        assert (await backend.load_checkpoint(tmp_path / "latest"))["metrics"] == {"loss": 1.0}
        await backend.save_checkpoint(2, {})

    anyio.run(main)
    assert latest_checkpoint(tmp_path).name == "step_000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_000001",
        "step_000002",
    ]


def test_the_process_ends_after_its_last_save(tmp_path):
    """Goal: a script whose last line starts a save loses nothing. Red with a daemon thread as the writer."""
    process = child(tmp_path, 0.5)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert checkpoint.read_metadata(tmp_path / "latest")["step"] == 2


def test_optimizer_state_of_other_parameters_is_refused(tmp_path):
    """Goal: a frozen layer is named. Red without the comparison of names: its state is silently left out."""

    def momentum(frozen: bool):
        model = tiny_model()
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.requires_grad_(not frozen)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        )
        return PyTorchTrainingBackend(model, optimizer, sft_loss, tmp_path)

    async def main():
        backend = momentum(frozen=True)
        await train_step(backend, sft_batch(), None)
        path = await backend.save_checkpoint(1, {})
        again = momentum(frozen=True)
        await again.load_checkpoint(path)
        key = again.model.lm_head.weight
        assert torch.equal(
            again.optimizer.state[key]["momentum_buffer"],
            backend.optimizer.state[backend.model.lm_head.weight]["momentum_buffer"],
        )
        with pytest.raises(
            CheckpointError, match=r"state of missing parameters: model\.layers\.0\.mlp\.down_proj"
        ):
            await momentum(frozen=False).load_checkpoint(path)

    anyio.run(main)


# --- which stay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "protected", "gone"),
    [
        (Retention(), [], []),
        (Retention(keep_last=2), [], [1, 2, 3]),
        (Retention(keep_last=2), [2], [1, 3]),
        (Retention(keep_last=9), [], []),
        (Retention(keep_last=1, best_metric="loss", best_mode="min"), [], [1, 2, 4]),
        (Retention(keep_last=1, best_metric="loss", best_mode="max"), [], [1, 3, 4]),
        (Retention(keep_last=1, best_metric="absent"), [], [1, 2, 3, 4]),
    ],
)
def test_expired(retention, protected, gone):
    """Goal: last n, best and protected stay; a value that is not a number never wins. Red with NaN compared."""
    losses = {1: float("nan"), 2: 3.0, 3: 1.0, 4: 1.5, 5: 2.0}
    found = [(Path(str(step)), {"loss": loss}) for step, loss in losses.items()]
    assert [
        int(path.name)
        for path in expired(found, retention, [Path(str(step)) for step in protected])
    ] == gone


def test_a_backend_keeps_what_it_is_told_to(tmp_path):
    """Goal: after each save the last and the best are there, and what was resumed from; each goes after its notice.

    Red with the resumed one unprotected, and with the notice given after the removal.
    """
    notices: list[str] = []

    def on_remove(path: Path) -> None:
        assert json.loads((path / "metadata.json").read_text())["step"] == int(path.name[5:])
        notices.append(path.name)

    retention = Retention(keep_last=1, best_metric="loss", best_mode="min", on_remove=on_remove)
    standing = []

    async def main():
        backend = tiny_backend(tmp_path, retention=retention)
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            await backend.save_checkpoint(step, {"loss": loss})
            standing.append([int(path.name[5:]) for path in list_checkpoints(tmp_path)])
        resumed = tiny_backend(tmp_path, retention=retention)
        await resumed.load_checkpoint(tmp_path / "latest")
        for step, loss in ((4, 0.5), (5, 0.7)):
            await resumed.save_checkpoint(step, {"loss": loss})
            standing.append([int(path.name[5:]) for path in list_checkpoints(tmp_path)])

    anyio.run(main)
    assert standing == [[1], [2], [2, 3], [3, 4], [3, 4, 5]]
    assert notices == ["step_000001", "step_000002"]
    assert (tmp_path / "latest").resolve().name == "step_000005"
    assert load_file(tmp_path / "latest" / "model.safetensors")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last=0: needs >= 1, or -1"),
        ({"best_mode": "least"}, "best_mode='least': needs 'min'"),
    ],
)
def test_a_retention_that_means_nothing(options, message):
    """Goal: keeping nothing is refused when it is said. Red with the checks off."""
    with pytest.raises(ValueError, match=message):
        Retention(**options)
