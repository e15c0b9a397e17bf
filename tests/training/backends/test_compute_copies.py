"""bfloat16 by copies of float32 masters, as on a card: on the CPU, where only the choice of it is stood in for."""

import json
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
import torch
from torch import nn

from rollouts.training.backends import precision
from rollouts.training.backends.compute_copies import ComputeCopies
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.loops.batching import split_batch
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.model_files import write_weights
from rollouts.training.model_loading import enable_activation_checkpointing
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import ppo_loss
from rollouts.training.value_head import ValueHead
from rollouts.training.whole_tensors import whole_weights
from tests.flash_stand_in import flash_on_cpu
from tests.training.backends.test_pytorch import rl_batch, sft_batch
from tests.training.tiny import tiny_backend, tiny_model

STEPS = 20
LR = (
    3e-3  # at 1e-2 autocast itself departs from float32 by 0.08: that is the step, not the rounding
)
WITHIN = 0.005  # of losses of about 3 nats; autocast is within 0.001 of float32


def train(backend: PyTorchTrainingBackend, steps: int) -> list[float]:
    """The loss of each step, all on batches of their own."""
    losses = []
    for seed in range(steps):
        for part in split_batch(sft_batch(seed=seed), rank=0, world_size=1, micro_batch_size=4):
            backend.forward_backward(part).wait()
        losses.append(backend.optim_step().wait()["loss"])
    return losses


def in_lora(model: nn.Module) -> nn.Module:
    settings = LoraSettings(
        rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", init_seed=0
    )
    return apply_lora(model, settings, base_name="seed 0")


def plain(model: nn.Module) -> nn.Module:
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    enable_activation_checkpointing(model)
    return model


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose: copies, as on CUDA, or autocast, as on the CPU."""
    return lambda copies: monkeypatch.setattr(precision, "use_copies", lambda device: copies)


@pytest.mark.parametrize(
    ("change", "tied", "steps"),
    [
        (plain, True, STEPS),
        (plain, False, 5),
        (checkpointed, True, 5),
        (in_lora, True, 5),
    ],
)
def test_copies_train_as_autocast_does(
    tmp_path: Path,
    as_on_a_card: Callable[[bool], None],
    change: Callable[[nn.Module], nn.Module],
    tied: bool,
    steps: int,
) -> None:
    """Goal: over 20 steps losses are autocast's within bf16; at rest weights, gradients and state are float32.

    Red with copies that are not made again after a step, and with a gradient that replaces its master's (accumulation).
    """
    losses = []
    for copies in (False, True):
        as_on_a_card(copies)
        seen: set[torch.dtype] = set()
        model = change(tiny_model(tied=tied))
        backend = tiny_backend(tmp_path, model=model, compute_dtype="bfloat16", lr=LR)
        masters = list(model.parameters())
        layer = model.get_submodule(
            next(n for n, m in model.named_modules() if n.endswith("layers.1"))
        )
        layer.register_forward_hook(lambda *hook, seen=seen: seen.add(hook[2].dtype))
        losses.append(train(backend, steps))
        assert seen == {torch.bfloat16 if copies else torch.float32}
        assert all(mine is master for mine, master in zip(model.parameters(), masters, strict=True))
        assert {parameter.dtype for parameter in masters} == {torch.float32}
        assert {
            value.dtype for state in backend.optimizer.state.values() for value in state.values()
        } == {torch.float32}
        backend.forward_backward(sft_batch()).wait()
        assert {p.grad.dtype for p in masters if p.grad is not None} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], abs=WITHIN)
    assert losses[0] != losses[1]


def test_kernel_and_copies_together(tmp_path: Path, as_on_a_card: Callable[[bool], None]) -> None:
    """Goal: what a card runs, the kernel over copies: one call a layer and pass. Red without the copies in place."""
    as_on_a_card(True)
    backend = tiny_backend(tmp_path, compute_dtype="bfloat16")
    with flash_on_cpu() as calls:
        backend.forward_backward(sft_batch()).wait()
    assert (calls.forward, calls.backward) == (2, 2)


@pytest.mark.parametrize("lora", [False, True])
def test_rl_with_a_reference_and_values(
    tmp_path: Path, as_on_a_card: Callable[[bool], None], lora: bool
) -> None:
    """Goal: equal weights give a KL of exactly 0, values are float32, and the losses are autocast's.

    Red with the reference left in float32 beside copies in bfloat16: the KL is not 0.
    """
    rows = []
    for copies in (False, True):
        as_on_a_card(copies)
        model = in_lora(tiny_model()) if lora else tiny_model()
        reference = as_reference(tiny_model(), "seed 0")
        backend = tiny_backend(
            tmp_path,
            model=model,
            loss_fn=ppo_loss,
            compute_dtype="bfloat16",
            reference=reference,
            value_head=ValueHead(16, lr=1e-2),
        )
        batch = rl_batch()
        batch["returns"], batch["old_values"] = torch.zeros(2, *batch["input_ids"].shape)
        metrics = [backend.forward_backward(batch).wait(), backend.optim_step().wait()]
        metrics.append(backend.forward_backward(batch).wait())
        assert backend.values(batch).wait().dtype is torch.float32
        assert metrics[0]["kl_reference"] == 0.0
        assert metrics[2]["kl_reference"] > 0
        rows.append([row["loss"] for row in metrics])
    assert rows[1] == pytest.approx(rows[0], abs=0.02)


def test_checkpoints_and_weights_are_the_masters(
    tmp_path: Path, as_on_a_card: Callable[[bool], None]
) -> None:
    """Goal: a resume is exact, and what is saved while a pass runs says float32.

    Red with copies kept over `load_checkpoint`, and with the config's dtype asked of the live model.
    """
    as_on_a_card(True)
    backend = tiny_backend(tmp_path, compute_dtype="bfloat16")
    train(backend, 2)
    path = anyio.run(backend.save_checkpoint, 2, {})
    rest = train(backend, 3)
    again = tiny_backend(tmp_path / "other", seed=3, compute_dtype="bfloat16")
    train(again, 1)
    anyio.run(again.load_checkpoint, path)
    assert train(again, 3) == rest
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    weights = whole_weights(backend.model, copy=False)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    with ComputeCopies(backend.model, torch.bfloat16).in_place():
        write_weights(backend.model, tmp_path / "weights", weights)
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["dtype"] == "float32"


def test_weights_that_others_change_are_seen(
    tmp_path: Path, as_on_a_card: Callable[[bool], None]
) -> None:
    """Goal: `on_model` may write to weights. Red with copies made again after optimizer steps alone."""
    as_on_a_card(True)
    backend = tiny_backend(tmp_path, compute_dtype="bfloat16")
    before = backend.log_probs(sft_batch()).wait()

    def scale(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(0.5)

    backend.on_model(scale).wait()
    assert not torch.equal(backend.log_probs(sft_batch()).wait(), before)
