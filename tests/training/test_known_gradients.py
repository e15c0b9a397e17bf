"""A loss that says its gradient beforehand: the output head makes its own from the logits that are there, same bits."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rollouts.training import head_ways, log_probs
from rollouts.training.known_gradients import known_gradient
from rollouts.training.log_probs import TokenLogProbs, selected_log_probs
from rollouts.training.rl_losses import policy_loss, sft_loss
from tests.training.backends.test_pytorch import sft_batch
from tests.training.test_log_probs import N, V, inputs
from tests.training.tiny import tiny_backend


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **kwargs or {})


def trained(known: bool, temperature: float, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int]:
    """Log-probs and gradients of the same inputs, and how many products they took."""
    hidden, weight, bias, rows, targets = inputs()
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    gradient = torch.randn(N, dtype=wide, generator=torch.Generator().manual_seed(1))
    with Products() as products:
        found, _ = selected_log_probs(
            leaves[0],
            rows,
            targets,
            *leaves[1:],
            temperature=temperature,
            known_grad_N=gradient if known else None,
        )
        gradients = torch.autograd.grad(found, leaves, gradient)
    return (found.detach(), *gradients), products.count


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_one_product_less(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, temperature: float, dtype: torch.dtype
) -> None:
    """Goal: each chunk's logits are computed once, and nothing changes. Red with what is known left unused."""
    monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", 2 * V)
    if compiled:
        made = head_ways.Fused(backend="eager")
        monkeypatch.setattr(head_ways, "fused_on", lambda kind: made)
    (expected, plain), (found, less) = (
        trained(known, temperature, dtype) for known in (False, True)
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    chunks = -(-N // 2)
    assert (plain, less) == (4 * chunks, 3 * chunks)


def test_another_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a loss that brings another gradient than it said does not train. Red without the assertion."""
    monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", 2 * V)
    hidden, weight, bias, rows, targets = inputs()
    known = torch.ones(N, dtype=hidden.dtype)
    found, _ = selected_log_probs(hidden, rows, targets, weight, bias, known_grad_N=known)
    with pytest.raises(RuntimeError, match="not the known one"):
        (2 * found.sum()).backward()
    with pytest.raises(ValueError, match="known_grad_N"):
        selected_log_probs(
            hidden, rows, targets, weight, bias, with_entropy=True, known_grad_N=known
        )


def test_what_sft_says_is_its_gradient() -> None:
    """Goal: to the bit what autograd brings, for weights and in both dtypes. Red with the sign left out."""
    for dtype in (torch.float32, torch.float64):
        mask = torch.tensor([[1.0, 0.5, 0.0, 1.0], [0.0, 0.0, 1.0, 0.3]])
        keep = mask[:, 1:] != 0
        log_probs_N = torch.randn(int(keep.sum()), dtype=dtype, requires_grad=True)
        batch = {"loss_mask": mask, "tokens_global": 7.0}
        sft_loss(TokenLogProbs(keep, log_probs_N, None, 1.0), torch.zeros(2, 4), **batch).backward()
        known = known_gradient(sft_loss, batch)
        assert known is not None and log_probs_N.grad is not None
        assert torch.equal(known(dtype)[:, 1:][keep], log_probs_N.grad)
    # the mean of a batch: its host would wait
    assert known_gradient(sft_loss, {"loss_mask": mask}) is None
    assert known_gradient(partial(sft_loss), batch) is known_gradient(policy_loss, batch) is None


def test_a_backend_uses_what_is_known(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: an SFT step takes one product less for each of the head's chunks. Red with the backend not asking."""
    counted = []
    for known in (None, known_gradient):
        monkeypatch.setattr(
            "rollouts.training.backends.passes.known_gradient", known or (lambda *_: None)
        )
        monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", 24 * 4)
        backend = tiny_backend(tmp_path)
        batch = {**sft_batch(), "tokens_global": 9.0}
        with Products() as products:
            backend._steps.forward_backward(batch)
        counted.append(products.count)
    chunks = -(-int((batch["loss_mask"][:, 1:] != 0).sum()) // 4)
    assert chunks > 1 and counted[0] - counted[1] == chunks
