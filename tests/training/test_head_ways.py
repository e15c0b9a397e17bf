"""The output head as a card runs it, on a CPU: bytes and peak on fake tensors, numbers of what is compiled."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rollouts.training import head_ways, log_probs
from rollouts.training.log_probs import selected_log_probs
from tests.training.test_log_probs import M, N, V, inputs, plain

TOKENS, WIDTH, VOCABULARY = 8192, 1024, 151_936  # a micro-batch of the 0.6B shape
GB = 1e9


class Counted(TorchDispatchMode):
    """Bytes that operations read and write, views aside; and the most that was alive at once, of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.alive = self.peak = 0
        self.paused = False  # inside of what is compiled: its intermediates are in no memory
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        made = [
            t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)
        ]
        if made and not self.paused and not func.is_view and "detach" not in func.name():
            inputs = [
                t for t in given if not func.name().startswith(("aten::empty", "aten::new_empty"))
            ]
            outputs = [t for t in made if "empty" not in func.name()]
            self.moved += sum(_bytes(t) for t in _read(func.name(), inputs, outputs) + outputs)
        for tensor in made:
            if not self.paused:
                self.hold(tensor)
        return out

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _read(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """What an operation reads; indexing reads as much as it gives, and writes as much as it gets."""
    if name.startswith(("aten::index_select", "aten::gather", "aten::index.")):
        return outputs
    if name.startswith(("aten::index_put", "aten::index_copy", "aten::copy_")):
        outputs.clear()
        return inputs[1:] * 2
    if name.startswith(("aten::zero", "aten::fill", "aten::new_zeros")):
        return []
    return inputs


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class OnePass:
    """What is compiled, as counts see it: logits read three times (maximum, sum, result), results written once."""

    works = True

    def __init__(self, counts: Counted) -> None:
        self._counts = counts

    def __call__(self, function: Any, logits_nV: Tensor, *others: Any) -> Any:
        self._counts.paused = True
        out = function(logits_nV, *others)
        self._counts.paused = False
        for tensor in out if isinstance(out, tuple) else (out,):
            if tensor is not None:
                self._counts.moved += _bytes(tensor)
                self._counts.hold(tensor)
        self._counts.moved += 3 * _bytes(logits_nV)
        return out


def counted(chunk: int, *, entropy: bool, compiled: bool, known: bool = False) -> Counted:
    """The head forward and backward for the shape above, as on a card."""
    with FakeTensorMode(), Counted() as counts, pytest.MonkeyPatch.context() as patch:
        hidden = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        rows, targets = torch.arange(TOKENS), torch.zeros(TOKENS, dtype=torch.int64)
        counts.moved = 0
        fused = OnePass(counts) if compiled else None
        patch.setattr(log_probs, "_CHUNK_ELEMENTS", chunk)
        patch.setattr(head_ways, "has_wide_products", lambda device: True)
        patch.setattr(head_ways, "fused_on", lambda kind: fused)
        options = {"with_entropy": entropy, "known_grad_N": torch.ones(TOKENS) if known else None}
        found, entropies = selected_log_probs(hidden, rows, targets, weight, **options)
        (found.sum() if entropies is None else found.sum() + entropies.sum()).backward()
    return counts


@pytest.mark.parametrize(
    ("compiled", "entropy", "known", "most_GB"),
    [
        (False, False, False, 125),
        (True, False, False, 80),
        (True, True, False, 80),
        (False, False, True, 100),
        (True, False, True, 60),
    ],
)
def test_bytes_of_a_micro_batch(compiled: bool, entropy: bool, known: bool, most_GB: int) -> None:
    """Goal: the head of 8,192 tokens moves at most so many bytes, and holds at most 1.3 times the least it can.

    Red with chunks of 2^24 (277 GB), with a product beside the gradient, with 2^27 step by step (the peak).
    """
    chunk = head_ways.cuda_chunk_elements(24 * 2**30, compiled)
    found = counted(chunk, entropy=entropy, compiled=compiled, known=known)
    least = counted(2**23, entropy=entropy, compiled=compiled, known=known)
    assert found.moved <= most_GB * GB
    assert found.peak <= 1.3 * least.peak


def gradients(
    outputs: Any, weights: tuple[Tensor, Tensor], into: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)), into
    )


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> head_ways.Fused:
    """What CUDA compiles, on the CPU."""
    torch.compiler.reset()
    made = head_ways.Fused(backend="aot_eager")
    monkeypatch.setattr(head_ways, "fused_on", lambda kind: made)
    return made


@pytest.mark.parametrize("chunk_rows", [2, N, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_compiled_parts_are_the_closed_form(
    monkeypatch: pytest.MonkeyPatch, fused: head_ways.Fused, chunk_rows: int, temperature: float
) -> None:
    """Goal: log-probs, entropies and gradients in float64: autograd's through plain logits, and the closed form's.

    Red with the temperature left out of the gradient, and with the entropy's sign turned.
    """
    monkeypatch.setattr(log_probs, "_CHUNK_ELEMENTS", chunk_rows * V)
    hidden, weight, bias, rows, targets = inputs()
    factors = torch.randn(2, N, dtype=torch.float64)
    ours = selected_log_probs(
        hidden, rows, targets, weight, bias, temperature=temperature, with_entropy=True
    )
    theirs = plain(hidden, weight, bias, rows, targets, temperature)
    mine = gradients(ours, (factors[0], factors[1]), (hidden, weight, bias))
    expected = gradients(theirs, (factors[0], factors[1]), (hidden, weight, bias))
    torch.testing.assert_close((*ours, *mine), (*theirs, *expected), rtol=0, atol=1e-12)
    # p = softmax(z / T): d log p_t / dz = (1[t] - p) / T, dH / dz = -p (log p + H) / T
    scaled = (hidden[rows] @ weight.T + bias).detach() / temperature
    p = scaled.exp() / scaled.exp().sum(1, keepdim=True)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    one = torch.nn.functional.one_hot(targets, V)
    dz = (
        (one - p) * factors[0][:, None] - p * (p.log() + entropy) * factors[1][:, None]
    ) / temperature
    torch.testing.assert_close(mine[1], dz.T @ hidden[rows].detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mine[2], dz.sum(0), rtol=0, atol=1e-12)
    assert (
        fused.works
        and sorted(set(range(M)) - set(rows.tolist()))
        == (mine[0] == 0).all(1).nonzero().flatten().tolist()
    )


def test_a_token_that_cannot_be_drawn_harms_nothing_compiled(fused: head_ways.Fused) -> None:
    """Goal: logits of -inf give a finite entropy and gradient. Red with p log p as it stands."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    found, entropy = selected_log_probs(
        logits, torch.tensor([0]), torch.tensor([2]), with_entropy=True
    )
    assert entropy is not None
    (found.sum() + entropy.sum()).backward()
    assert (
        logits.grad is not None
        and logits.grad.isfinite().all()
        and float(entropy.detach()) == pytest.approx(0.6931, abs=1e-4)
    )


def test_a_host_that_cannot_compile_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Goal: without a compiler the same numbers, one warning, and one attempt. Red with the error let through."""

    def refuse(graph: Any, example: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    hidden, weight, bias, rows, targets = inputs()
    expected = selected_log_probs(hidden, rows, targets, weight, bias, with_entropy=True)
    wanted = gradients(expected, (torch.ones(N), torch.ones(N)), (hidden, weight, bias))
    torch.compiler.reset()
    made = head_ways.Fused(backend=refuse)
    monkeypatch.setattr(head_ways, "fused_on", lambda kind: made)
    found = selected_log_probs(hidden, rows, targets, weight, bias, with_entropy=True)
    assert torch.equal(found[0], expected[0])
    mine = gradients(found, (torch.ones(N), torch.ones(N)), (hidden, weight, bias))
    torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    assert not made.works
    said = [record.getMessage() for record in caplog.records if record.name == head_ways.__name__]
    assert len(said) == 1 and "C compiler" in said[0]


def test_products_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: each chunk's product is added in float32 in place, by CUDA's operation; stood in for on the CPU.

    Red with the product rounded to bf16 first: 1e-3 of what is small beside the sum is lost.
    """

    def addmm(
        total: Tensor,
        a: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        *,
        beta: Any = 1,
        alpha: Any = 1,
        out: Tensor,
    ) -> Tensor:
        assert a.dtype is b.dtype is torch.bfloat16 and dtype is total.dtype is torch.float32
        return out.copy_(beta * total + alpha * (a.float() @ b.float()))

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(head_ways, "has_wide_products", lambda device: True)
    left, right = (torch.randn(5, width).bfloat16() for width in (7, 3))
    total = torch.randn(7, 3)
    expected = total + left.float().T @ right.float()
    try:
        head_ways.add_product(total, left, right)
    finally:
        library._destroy()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("gib", "compiled", "elements"),
    [
        (141, True, 2**27),
        (80, False, 2**26),
        (24, True, 2**27),
        (16, True, 2**27),
        (10, True, 2**26),
        (4, True, 2**25),
    ],
)
def test_chunks_go_by_a_cards_memory(gib: int, compiled: bool, elements: int) -> None:
    """Goal: a small card or a slice of one gets smaller chunks. Red with one size for all."""
    assert head_ways.cuda_chunk_elements(gib * 2**30, compiled) == elements
