"""LoRA: only adapters move, exports are the adapted model, resume is exact, and the wrong base is refused."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rollouts.training.backends import create_pytorch_backend
from rollouts.training.checkpoint import CheckpointError
from rollouts.training.log_probs import selected_log_probs
from rollouts.training.loops.train_step import train_step
from rollouts.training.lora import (
    LoraSettings,
    apply_lora,
    base_as_reference,
    merged_state_dict,
    read_base,
)
from rollouts.training.model_loading import ModelError
from rollouts.training.optim import build_optimizer
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import policy_loss
from tests.training.backends.test_pytorch import rl_batch, sft_batch
from tests.training.tiny import tiny_backend, tiny_model, tiny_tokenizer

SETTINGS = LoraSettings(rank=3, alpha=6.0, dropout=0.0, target_modules="all-linear", init_seed=0)
RATES = {"matrix_lr": 5e-2, "embedding_lr": 0.0, "unembedding_lr": 0.0, "weight_decay": 0.01}
IDS = torch.tensor([[2, 3, 4, 5, 1], [6, 7, 8, 9, 10]])


def lora_backend(
    directory: Path, *, base_seed: int = 0, settings: LoraSettings = SETTINGS, **options
):
    model = options.pop("model", None) or tiny_model(base_seed, tied=options.pop("tied", True))
    apply_lora(model, settings, base_name="base")
    optimizer = build_optimizer(model, **RATES, beta1=0.9, beta2=0.95, eps=1e-8)
    return tiny_backend(directory, model=model, optimizer=optimizer, **options)


async def steps(backend, seeds):
    return [await train_step(backend, sft_batch(seed=seed), 3) for seed in seeds]


def test_only_the_adapters_are_trained(tmp_path):
    """Goal: frozen weights stay bit for bit, adapters move, and before the first step nothing has changed.

    Red with requires_grad left as loaded, and with the adapter's second half drawn too.
    """
    backend, plain = lora_backend(tmp_path), tiny_model()
    model = backend.model
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert [group["name"] for group in backend.optimizer.param_groups] == ["matrices"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7  # two halves, two layers, seven projections each
    assert sum(p.numel() for p in backend.optimizer.param_groups[0]["params"]) == 3 * 2 * (
        32 + 24 + 24 + 32 + 3 * 48
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    metrics = anyio.run(steps, backend, range(12))
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_the_adapted_model_and_saving_moves_nothing(tmp_path, tied):
    """Goal: engines get a plain model whose logits are the adapted one's to 1e-6, and the weights that train stay bit
    for bit (slime#780). Red with the scaling left out of the merge, and with peft's merge and unmerge in place."""
    backend = lora_backend(tmp_path / "sft", tied=tied)
    anyio.run(steps, backend, range(3))
    before = {name: tensor.clone() for name, tensor in backend.model.state_dict().items()}
    path = anyio.run(backend.save_weights, tmp_path / "weights" / "version_000001")
    saved = anyio.run(backend.save_checkpoint, 3, {})
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    for directory in (path, saved):
        model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(report.values()), report
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        difference = model(input_ids=IDS).logits - backend.model(input_ids=IDS).logits
        assert difference.abs().max().item() < 1e-6
        assert set(model.state_dict()) == set(tiny_model(tied=tied).state_dict())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in backend.model.state_dict().items()
    )


def test_peft_reads_the_adapter(tmp_path):
    """Goal: `adapter/` is peft's own layout, over the base. Red without the prefix of the names in peft's files."""
    backend = lora_backend(tmp_path)
    anyio.run(steps, backend, range(2))
    path = anyio.run(backend.save_checkpoint, 2, {})
    adapted = PeftModel.from_pretrained(tiny_model(), path / "adapter")
    torch.testing.assert_close(
        adapted(input_ids=IDS).logits, backend.model(input_ids=IDS).logits, rtol=0, atol=1e-6
    )
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
        "base",
        3,
        6.0,
    )
    assert read_base(path)["name"] == "base"


def test_resume_is_bit_for_bit(tmp_path):
    """Goal: 2 + resume + 2 steps equal 4, dropout's random numbers included. Red with the adapter not loaded."""
    settings = LoraSettings(
        rank=2, alpha=4.0, dropout=0.2, target_modules=("q_proj", "down_proj"), init_seed=1
    )
    whole = lora_backend(tmp_path, settings=settings)
    anyio.run(steps, whole, range(2))
    path = anyio.run(whole.save_checkpoint, 2, {})
    expected = anyio.run(steps, whole, range(2, 4))
    torch.manual_seed(77)
    resumed = lora_backend(tmp_path, settings=settings)
    anyio.run(resumed.load_checkpoint, path)
    assert anyio.run(steps, resumed, range(2, 4)) == expected
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )


def test_a_checkpoint_goes_on_over_its_own_base_alone(tmp_path):
    """Goal: another base, or full training of an adapter's checkpoint, is refused. Red with _check_base off: the first
    goes on over other weights."""
    path = anyio.run(lora_backend(tmp_path / "a").save_checkpoint, 1, {})
    full = anyio.run(tiny_backend(tmp_path / "b").save_checkpoint, 1, {})
    for make, load, message in (
        (
            lambda: lora_backend(tmp_path, base_seed=1),
            path,
            r"its adapter belongs to the weights of base \(sha256 ",
        ),
        (lambda: tiny_backend(tmp_path), path, "was trained with LoRA, this run is without"),
        (lambda: lora_backend(tmp_path), full, "was trained without LoRA, this run is with LoRA"),
        (
            lambda: lora_backend(tmp_path, settings=LoraSettings(4, 8.0, 0.0, "all-linear", 0)),
            path,
            "this model has",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            anyio.run(make().load_checkpoint, load)


def test_adapters_are_drawn_from_their_seed(tmp_path):
    """Goal: a function of the seed that leaves the global generator alone. Red without fork_rng, and manual_seed."""

    def drawn(seed: int) -> torch.Tensor:
        model = apply_lora(
            tiny_model(), LoraSettings(2, 4.0, 0.0, ("q_proj",), seed), base_name="base"
        )
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), "does not fit base: .*q_prj.* not found"),
        (("q_proj", "embed_tokens"), "model.embed_tokens is the model's embedding or output head"),
        (("q_proj", "lm_head"), "lm_head is the model's embedding or output head"),
    ],
)
def test_targets_that_do_not_fit_are_named(targets, message):
    """Goal: a typo and a tied table are errors. Red without the check of the tables: lm_head's product is exported
    into the embeddings that it is tied to."""
    with pytest.raises(ModelError, match=message):
        apply_lora(tiny_model(), LoraSettings(2, 4.0, 0.0, targets, 0), base_name="base")


def test_transposed_layers_merge(tmp_path):
    """Goal: GPT-2's Conv1D keeps its weights transposed, and its merge is too. Red with B @ A added as it stands."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=24, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    ).eval()
    plain = GPT2LMHeadModel(model.config).eval()
    apply_lora(model, SETTINGS, base_name="base").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(
        plain(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_frozen_weights_are_the_reference(tmp_path, dropout):
    """Goal: the KL to the start costs no second model: exactly 0 at the first step, then what a loaded copy gives.

    Red with the adapters left on: the KL stays 0.
    """
    settings = dataclasses.replace(SETTINGS, dropout=dropout)
    loss_fn = partial(policy_loss, kl_coef=0.5, kl_kind="k2")

    def run(own: bool) -> list[dict]:
        torch.manual_seed(3)
        model = apply_lora(tiny_model(), settings, base_name="base")
        optimizer = build_optimizer(model, **RATES, beta1=0.9, beta2=0.95, eps=1e-8)
        reference = base_as_reference(model) if own else as_reference(tiny_model(), "base")
        backend = tiny_backend(
            tmp_path, model=model, optimizer=optimizer, loss_fn=loss_fn, reference=reference
        )

        async def main() -> list[dict]:
            return [await train_step(backend, rl_batch(seed), None) for seed in range(3)]

        metrics = anyio.run(main)
        assert (
            model.training and len([p for p in model.parameters() if p.requires_grad]) == 2 * 2 * 7
        )
        return metrics

    own = run(True)
    assert own == run(False)
    assert own[0]["kl_reference"] == 0.0 < own[2]["kl_reference"]


def test_a_frozen_head_costs_no_gradient():
    """Goal: neither the product nor the [V, D] buffer of the head's gradient is made. Red with it always made."""
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(32, 8, requires_grad=True)
    made, gradients = [], []
    for trained in (True, False):
        log_probs, _ = selected_log_probs(
            hidden, torch.arange(6), torch.arange(6), weight.requires_grad_(trained)
        )
        with Shapes() as shapes:
            (gradient,) = torch.autograd.grad(log_probs.sum(), [hidden])
        made.append(weight.shape in shapes.seen)
        gradients.append(gradient)
    assert made == [True, False]
    assert torch.equal(*gradients)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            tensor.shape
            for tensor in (out if isinstance(out, (tuple, list)) else (out,))
            if torch.is_tensor(tensor)
        }
        return out


def test_the_factory_wraps_and_continues(tmp_path):
    """Goal: the same call and load_checkpoint go on; the checkpoint alone is a full model, to train anew. Red with
    `lora` not handed on by the factory."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def make(name: Path):
        return create_pytorch_backend(
            name, tmp_path / "sft", "cpu", learning_rate=1e-2, lora=SETTINGS
        )

    first = make(tmp_path / "model")
    anyio.run(steps, first, range(2))
    path = anyio.run(first.save_checkpoint, 2, {})
    again = make(tmp_path / "model")
    anyio.run(again.load_checkpoint, path)
    assert again.step == 2
    assert read_base(path)["name"] == str(tmp_path / "model")
    fresh = make(path)
    difference = fresh.model(input_ids=IDS).logits - first.model(input_ids=IDS).logits
    assert difference.abs().max().item() < 1e-6
