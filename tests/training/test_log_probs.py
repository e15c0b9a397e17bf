"""Log-probs with the head inside: against autograd through plain logits, in chunks, and what is held meanwhile."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rollouts.training import log_probs
from rollouts.training.log_probs import selected_log_probs

M, D, V, N = 9, 5, 7, 6


def inputs(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, dtype=dtype, generator=draw).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype, generator=draw).requires_grad_()
    bias = torch.randn(V, dtype=dtype, generator=draw).requires_grad_()
    return (
        hidden,
        weight,
        bias,
        torch.randperm(M, generator=draw)[:N],
        torch.randint(V, (N,), generator=draw),
    )


def plain(hidden, weight, bias, rows, targets, temperature):  # noqa: PLR0917 — the order of inputs()
    log_probs_NV = torch.log_softmax(F.linear(hidden, weight, bias)[rows] / temperature, -1)
    return log_probs_NV.gather(1, targets[:, None]).squeeze(1), -(
        log_probs_NV.exp() * log_probs_NV
    ).sum(-1)


@pytest.mark.parametrize("chunk_rows", [1, 4, N, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_those_through_plain_logits(
    monkeypatch, chunk_rows, temperature
):
    """Goal: log-probs, entropies and all three gradients are autograd's, however it is cut.

    Red with the temperature left out of the gradient, and with a chunk's rows written to another's place.
    """
    monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", chunk_rows * V)
    hidden, weight, bias, rows, targets = inputs()
    a, b = torch.randn(2, N, dtype=torch.float64)
    ours = selected_log_probs(
        hidden, rows, targets, weight, bias, temperature=temperature, with_entropy=True
    )
    theirs = plain(hidden, weight, bias, rows, targets, temperature)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)
    for pick in ((a, b), (a, None), (None, b)):  # either output alone has a gradient too
        grads = [
            torch.autograd.grad(
                sum((out * w).sum() for out, w in zip(outputs, pick, strict=True) if w is not None),
                (hidden, weight, bias),
                retain_graph=True,
            )
            for outputs in (ours, theirs)
        ]
        for mine, expected in zip(*grads, strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


def test_logits_may_be_given_as_they_are():
    """Goal: the same function for finished logits; rows not chosen get no gradient. Red with index_add of all rows."""
    hidden, weight, bias, rows, targets = inputs()
    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    ours, entropy = selected_log_probs(logits, rows, targets)
    assert entropy is None
    torch.testing.assert_close(
        ours, plain(hidden, weight, bias, rows, targets, 1.0)[0], rtol=0, atol=1e-13
    )
    (grad,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(grad[rows], F.one_hot(targets, V) - torch.softmax(logits[rows], -1))
    assert (
        sorted(set(range(M)) - set(rows.tolist()))
        == (grad == 0).all(1).nonzero().flatten().tolist()
    )


class Largest(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_than_a_chunk_of_log_probs_is_ever_held(monkeypatch):
    """Goal: [tokens, vocabulary] in float32 never exists, forward or backward. Red with one chunk of all rows."""
    tokens, width, vocabulary, chunk = 64, 4, 500, 8
    monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", chunk * vocabulary)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with Largest() as largest:
        ours, entropy = selected_log_probs(
            hidden, torch.arange(tokens), targets, weight, with_entropy=True
        )
        (ours.sum() + entropy.sum()).backward()
    assert 0 < largest.elements <= chunk * vocabulary
    logits = (hidden.detach() @ weight.detach().T).bfloat16().requires_grad_()
    with Largest() as largest:
        selected_log_probs(logits, torch.arange(tokens), targets)[0].sum().backward()
    assert 0 < largest.elements <= chunk * vocabulary


def test_autocast_runs_the_head_in_bfloat16_and_the_rest_in_float32():
    """Goal: log-probs are float32 of bf16 products, gradients in the parameters' dtype. Red with bf16 log-probs."""
    hidden, weight, bias, rows, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = selected_log_probs(hidden, rows, targets, weight, bias)
    logits = F.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()
    expected = torch.log_softmax(logits, -1)[rows].gather(1, targets[:, None]).squeeze(1)
    assert ours.dtype is torch.float32 and torch.equal(ours, expected)
    ours.sum().backward()
    assert weight.grad.dtype is hidden.grad.dtype is torch.float32
    exact = torch.autograd.grad(
        plain(hidden, weight, bias, rows, targets, 1.0)[0].sum(), (hidden, weight, bias)
    )
    for tensor, gradient in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=0.05, atol=0.05)


def test_a_token_that_cannot_be_drawn_harms_nothing():
    """Goal: logits of -inf give a finite entropy and finite gradients. Red with p log p taken as it stands."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    ours, entropy = selected_log_probs(
        logits, torch.tensor([0]), torch.tensor([2]), with_entropy=True
    )
    assert entropy.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    (ours + entropy).sum().backward()
    assert logits.grad.tolist() == [[-0.5, 0.0, 0.5]]


def test_a_batch_without_trained_tokens_has_a_gradient_of_zero():
    """Goal: a rank with nothing to train still runs its backward pass. Red with an early return of a constant."""
    hidden, weight, bias, *_ = inputs()
    nothing = torch.zeros(0, dtype=torch.long)
    ours, _ = selected_log_probs(hidden, nothing, nothing, weight, bias)
    ours.sum().backward()
    assert (
        ours.shape == (0,)
        and not hidden.grad.any()
        and not weight.grad.any()
        and not bias.grad.any()
    )
