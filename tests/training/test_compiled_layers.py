"""Layers compiled one by one: the numbers of the uncompiled model, few compilations, and what goes on uncompiled."""

import copy
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from rollouts.training import forward
from rollouts.training.backends import precision
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.compiled_layers import compile_layers, layers_of
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.model_loading import enable_activation_checkpointing
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import ppo_loss, sft_loss
from tests.flash_stand_in import flash_on_cpu
from tests.training.backends.test_pytorch import rl_batch, sft_batch
from tests.training.test_forward import batch_of
from tests.training.test_packed_attention import LAYERS, model_of, trained
from tests.training.tiny import tiny_backend, tiny_model

STEPS = 50
# kinds of layers: with and without a window; one in the other models
KINDS = {"gemma3_text": 2, "qwen2": 2}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Compilations of other tests are forgotten."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(
    model: nn.Module, backend: str = "eager"
) -> tuple[nn.Module, CompileCounterWithBackend]:
    """`model` with compiled layers, and a counter of compilations."""
    counter = CompileCounterWithBackend(backend)
    compile_layers(model, backend=counter)
    return model, counter


def runs_compiled(model: nn.Module) -> bool:
    return all(layer.forward._code.works for layer in layers_of(model))


@pytest.mark.parametrize("kind", sorted(forward.PACKABLE))
def test_each_architecture_compiles_whole(kind: str) -> None:
    """Goal: one compilation for all layers of a kind, without a cut, for packs of other lengths too; the same numbers.

    Red with the sizes of a pack compiled in (`dynamic=False`): one more for the second.
    """
    plain = model_of(kind)
    model, counter = compiled(copy.deepcopy(plain))
    for each in (plain, model):
        forward.prepare(each)
    for count in (6, 4):
        found = [log_probs_and_gradients(each, count) for each in (plain, model)]
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert counter.frame_count == KINDS.get(kind, 1)
    assert runs_compiled(model)


def log_probs_and_gradients(model: nn.Module, count: int) -> list[torch.Tensor]:
    batch = batch_of(count=count)
    found = forward.token_log_probs(model, batch, with_entropy=False)
    model.zero_grad()
    sft_loss(found, batch["labels"], batch["loss_mask"]).backward()
    return [found.log_probs_N.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def plain(model: nn.Module) -> nn.Module:
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    enable_activation_checkpointing(model)
    return model


def train(backend: PyTorchTrainingBackend, steps: int) -> list[float]:
    """The loss of each step, on packs of 1 to 9 documents of any lengths."""
    draw = random.Random(0)
    losses = []
    for seed in range(steps):
        backend.forward_backward(sft_batch(draw.randint(1, 9), seed=seed)).wait()
        losses.append(backend.optim_step().wait()["loss"])
    return losses


def adapted(model: nn.Module) -> nn.Module:
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"], init_seed=0)
    return apply_lora(model, settings, base_name="seed 0")


@pytest.mark.parametrize(
    ("change", "steps", "backend", "kinds"),
    [(plain, STEPS, "eager", 1), (adapted, 4, "eager", 2), (checkpointed, 4, "aot_eager", 2)],
    ids=["plain", "lora", "checkpointing in bfloat16"],
)
def test_packs_of_any_lengths(  # noqa: PLR0917 — four make up a case
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[nn.Module], nn.Module],
    steps: int,
    backend: str,
    kinds: int,
) -> None:
    """Goal: one compilation for 50 steps of any lengths, 7 documents (8 offsets) where a head is 8 wide among them;
    losses are the uncompiled model's within 1e-5. With adapters two: the first layer's input has no gradient.

    Red with torch's settings made in another thread than the backend's: one more, for the first pack's 8 alone.
    """
    monkeypatch.setattr(precision, "use_copies", lambda device: True)
    dtype = "bfloat16" if change is checkpointed else "float32"
    make = partial(tiny_backend, tmp_path, compute_dtype=dtype)
    expected = train(make(model=change(tiny_model())), steps)
    model, counter = compiled(change(tiny_model()), backend)
    assert train(make(model=model), steps) == pytest.approx(expected, abs=1e-5)
    assert 1 <= counter.frame_count <= kinds
    assert runs_compiled(model)


def test_rl_with_shared_prompts_and_a_reference(tmp_path: Path) -> None:
    """Goal: the same for samples that share a prompt, entropy, a reference and estimates without a gradient.

    Red with the sizes of a pack compiled in (`dynamic=False`).
    """
    losses = []
    layered, counter = compiled(tiny_model())
    for model in (tiny_model(), layered):
        reference = as_reference(tiny_model(), "seed 0")
        backend = tiny_backend(tmp_path, model=model, loss_fn=ppo_loss, reference=reference)
        rows = []
        for seed in range(6):
            rows.append(backend.forward_backward(rl_batch(seed)).wait())
            backend.optim_step().wait()
            rows.append(backend.forward(rl_batch(seed + 1)).wait())
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert counter.frame_count == 2  # with a gradient, and without
    assert runs_compiled(layered)


def test_checkpointing_is_inside() -> None:
    """Goal: compiled layers compute again what checkpointing says. Red with the layer's forward inside of
    transformers' wrapper in place of its class's: the kernel runs once a layer, not twice.
    """
    model = model_of("qwen3")
    enable_activation_checkpointing(model)
    forward.prepare(model)
    compiled(model, "aot_eager")
    with flash_on_cpu() as calls:
        trained(model)
    assert (calls.forward, calls.backward) == (2 * LAYERS, LAYERS)
    assert runs_compiled(model)


def test_what_cannot_be_compiled_runs_uncompiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Goal: a layer that would be cut (dropout in attention) trains on, and one warning says why.

    Red with the error passed on: the run ends.
    """
    model = tiny_model()
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.1
    model, _ = compiled(model)
    with caplog.at_level(logging.WARNING):
        losses = train(tiny_backend(tmp_path, model=model), 2)
    assert len(losses) == 2 and not runs_compiled(model)
    (message,) = [
        record.getMessage() for record in caplog.records if "uncompiled" in record.getMessage()
    ]
    assert message.startswith("the layers of Qwen2ForCausalLM run uncompiled from here on: ")


def test_an_error_of_the_model_is_its_own(tmp_path: Path) -> None:
    """Goal: what fails compiled and uncompiled ends with the model's own error. Red with the compiler's passed on."""
    model, _ = compiled(tiny_model())
    model.model.layers[1].mlp.down_proj = nn.Linear(7, 16, bias=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        tiny_backend(tmp_path, model=model).forward_backward(sft_batch()).wait()


def test_generation_runs_uncompiled() -> None:
    """Goal: generation, whose cache has a place for each layer, compiles nothing and gives the plain model's tokens.

    Red with `cached` always False: compiled for each layer and length.
    """
    model, counter = compiled(tiny_model())
    ids = torch.tensor([[2, 3, 4], [5, 6, 7]])
    found, expected = (
        each.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        for each in (model, tiny_model())
    )
    assert torch.equal(found, expected)
    assert counter.frame_count == 0


def test_a_copy_has_layers_of_its_own() -> None:
    """Goal: a deep copy computes with its own weights. Red with a lambda in place of `_Forward`."""
    model, _ = compiled(tiny_model())
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in again.model.layers.parameters():
            parameter.zero_()
    batch = batch_of()
    for each in (model, again):
        forward.prepare(each)
    found, other = (
        forward.token_log_probs(each, batch, with_entropy=False).log_probs_N
        for each in (model, again)
    )
    assert not torch.equal(found, other)


def test_a_model_without_layers_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Goal: a model that does not name its layers is not silently left as it is. Red without the warning."""
    compile_layers(nn.Linear(2, 2))
    assert "Linear runs uncompiled: it does not say which of its modules are layers" in caplog.text
