"""On a CUDA card: what differs there from the CPU. Run by scripts/gpu_check, skipped where there is no card.

Each compares the card with the CPU's fp32 on the same weights and tokens.
"""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from rollouts.training import forward, packed_attention
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.compiled_layers import compile_layers
from rollouts.training.log_probs import selected_log_probs
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.rl_losses import sft_loss
from rollouts.training.types import SFTTrainingConfig
from tests.training.tiny import sft_samples, tiny_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 12
BF16_WITHIN = 0.05  # absolute, on losses of about 3 nats, after up to 12 steps of their own


def sft_run(
    directory: Path, device: str, compute_dtype: str, *, compiled: bool = False
) -> list[float]:
    """The loss of every step, packed, from the same weights on any device."""
    backend = tiny_backend(directory, seed=0, compute_dtype=compute_dtype)
    if compiled:
        compile_layers(backend.model)
    moved = PyTorchTrainingBackend(
        model=backend.model.to(device),
        optimizer=backend.optimizer,
        loss_fn=sft_loss,
        checkpoint_dir=directory,
        device=device,
        compute_dtype=compute_dtype,
    )
    config = SFTTrainingConfig(num_steps=STEPS, batch_size=6, log_every=1, micro_batch_tokens=30)
    return [step["loss"] for step in anyio.run(run_sft_training, moved, sft_samples(24), config)]


def test_fp32_training_on_the_card_is_the_cpus(tmp_path: Path) -> None:
    """Goal: SFT in fp32 gives the CPU's losses to 1e-3. Red where documents of a packed row see one another."""
    expected = sft_run(tmp_path / "cpu", "cpu", "float32")
    assert sft_run(tmp_path / "cuda", "cuda", "float32") == pytest.approx(expected, abs=1e-3)


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[None]:
    """One entry for each call of `owner.name` from now on."""
    calls: list[None] = []
    actual = getattr(owner, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return actual(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_by_the_flash_kernel_is_the_cpus(
    tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: bf16 by the variable-length kernel, compiled too, is within rounding of the CPU's fp32.

    Red with the documents' offsets shifted by one, and where a layer does not call the kernel.
    """
    expected = sft_run(tmp_path / "cpu", "cpu", "float32")
    passes = counted(monkeypatch, forward, "hidden_states")
    calls = counted(monkeypatch, packed_attention.varlen, "varlen_attn")
    assert sft_run(tmp_path / "cuda", "cuda", "bfloat16", compiled=compiled) == pytest.approx(
        expected, abs=BF16_WITHIN
    )
    assert passes
    if not compiled:  # compiled code calls torch's operation, not the function
        assert len(calls) == 2 * len(passes)  # the tiny model has two layers


def test_a_checkpoint_of_the_card_resumes_on_it_and_on_the_cpu(tmp_path: Path) -> None:
    """Goal: weights, optimizer and random states cross devices. Red with the optimizer's state left on the card."""
    backend = tiny_backend(tmp_path, seed=0)
    card = PyTorchTrainingBackend(
        model=backend.model.to("cuda"),
        optimizer=backend.optimizer,
        loss_fn=sft_loss,
        checkpoint_dir=tmp_path,
        device="cuda",
    )
    samples = sft_samples(24)
    anyio.run(
        run_sft_training, card, samples, SFTTrainingConfig(num_steps=4, batch_size=6, log_every=1)
    )
    there = tiny_backend(tmp_path / "cpu", seed=5, max_grad_norm=1.0)
    resume = anyio.run(there.load_checkpoint, tmp_path / "latest")
    longer = SFTTrainingConfig(num_steps=8, batch_size=6, log_every=1)
    on_cpu = anyio.run(lambda: run_sft_training(there, samples, longer, resume=resume))
    resume = anyio.run(card.load_checkpoint, tmp_path / "step_000004")
    on_card = anyio.run(lambda: run_sft_training(card, samples, longer, resume=resume))
    assert [step["loss"] for step in on_card] == pytest.approx(
        [step["loss"] for step in on_cpu], abs=1e-3
    )


def test_log_probs_never_hold_all_logits() -> None:
    """Goal: at a 150K vocabulary the peak beyond the head's gradient is a fraction of all logits in fp32.

    Red with the plain `log_softmax(hidden @ weight.T)` in place of ours.
    """
    tokens, width, vocabulary = 4096, 512, 150_000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs, _ = selected_log_probs(hidden, torch.arange(tokens, device="cuda"), targets, weight)
    log_probs.sum().backward()
    held = torch.cuda.max_memory_allocated() - before
    # accumulated in fp32, handed on in bf16, a chunk's product
    gradients = weight.numel() * (4 + 2) + weight.numel() * 4
    assert held - gradients < tokens * vocabulary * 4 / 4
