"""Parameter groups cover every parameter once, Muon is its formula, schedules are theirs."""

import copy
import dataclasses
import math

import anyio
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rollouts.training.checkpoint import CheckpointError
from rollouts.training.loops.train_step import train_step
from rollouts.training.optim import (
    NS_COEFFICIENTS,
    NS_EPS,
    MuonSettings,
    build_optimizer,
    lr_factor,
    orthogonalize,
    parameter_groups,
)
from tests.training.backends.test_pytorch import sft_batch
from tests.training.tiny import tiny_backend, tiny_model

RATES = {"matrix_lr": 0.1, "embedding_lr": 0.2, "unembedding_lr": 0.3, "weight_decay": 0.5}
ADAMW = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-10}
MUON = MuonSettings(
    momentum=0.9,
    nesterov=True,
    ns_steps=5,
    adjust_lr="original",
    vector_lr=0.05,
    width_reference=None,
)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(tied):
    """Goal: a tied head trains once, with the embeddings. Red with state_dict() in place of parameters()."""
    model = tiny_model(tied=tied)
    groups = {group["name"]: group for group in parameter_groups(model, **RATES)}
    assert list(groups) == ["matrices", "embeddings", *([] if tied else ["unembedding"]), "vectors"]
    ids = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["lr"] for group in groups.values()] == [0.1, 0.2, *([] if tied else [0.3]), 0.1]
    assert groups["embeddings"]["params"] == [model.model.embed_tokens.weight]
    assert all(parameter.ndim == 1 for parameter in groups["vectors"]["params"])
    assert groups["vectors"]["weight_decay"] == 0.0
    assert {group["weight_decay"] for name, group in groups.items() if name != "vectors"} == {0.5}


def test_frozen_parameters_are_left_out():
    """Goal: requires_grad=False is not decayed away. Red without the check."""
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert "embeddings" not in [group["name"] for group in parameter_groups(model, **RATES)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model, **RATES, beta1=0.9, beta2=0.95, eps=1e-8)


def test_adamw_gets_every_constant_and_keeps_float32_state():
    """Goal: each constant has its effect, and the state is float32 (AReaL#1292). Red with beta2 left at its default."""
    model = tiny_model()
    optimizer = build_optimizer(model, **RATES, beta1=0.7, beta2=0.8, eps=1e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (0.7, 0.8, 1e-3)
    }
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {
        optimizer.state[p][key].dtype
        for p in model.parameters()
        for key in ("exp_avg", "exp_avg_sq")
    } == {torch.float32}
    with pytest.raises(ValueError, match="kind='sgd': needs 'adamw' or 'muon'"):
        build_optimizer(model, kind="sgd", **RATES, **ADAMW)
    for kind, muon in (("muon", None), ("adamw", MUON)):
        with pytest.raises(
            ValueError, match="needs MuonSettings with kind='muon', and None with 'adamw'"
        ):
            build_optimizer(model, kind=kind, muon=muon, **RATES, **ADAMW)


def test_position_embeddings_are_embeddings():
    """Goal: every embedding table trains as one, never by Muon. Red with the input embedding alone: wpe a matrix."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    groups = {group["name"]: group["params"] for group in parameter_groups(model, **RATES)}
    assert {id(p) for p in groups["embeddings"]} == {
        id(model.transformer.wte.weight),
        id(model.transformer.wpe.weight),
    }


def muon_optimizer(model, **changes):
    return build_optimizer(
        model, kind="muon", muon=dataclasses.replace(MUON, **changes), **RATES, **ADAMW
    )


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def newton_schulz(update: torch.Tensor, steps: int) -> torch.Tensor:
    """Written out in float64: X = U / |U|, then X = a X + (b A + c A A) X with A = X X^T, on the wide orientation."""
    a, b, c = NS_COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.double().T if tall else update.double()
    x = x / max(x.norm().item(), NS_EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize(
    "changes",
    [{}, {"nesterov": False}, {"momentum": 0.5}, {"ns_steps": 2}, {"adjust_lr": "match_rms_adamw"}],
    ids=str,
)
def test_muon_is_its_formula(changes):
    """Goal: three steps of every matrix are the formula's in float64, to the bfloat16 that Newton-Schulz runs in.

    Red with each constant left at torch's default in turn, and with the decay after the update.
    """
    settings = dataclasses.replace(MUON, **changes)
    model = tiny_model()
    optimizer = muon_optimizer(model, **changes)
    matrices = [
        (name, p) for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name
    ]
    expected = start = {name: parameter.detach().double() for name, parameter in matrices}
    buffers = {name: torch.zeros_like(value) for name, value in expected.items()}
    m = settings.momentum
    for seed in range(3):
        give_gradients(model, seed)
        for name, parameter in matrices:
            gradient, (rows, columns) = parameter.grad.double(), parameter.shape
            buffers[name] = m * buffers[name] + (1 - m) * gradient
            update = (1 - m) * gradient + m * buffers[name] if settings.nesterov else buffers[name]
            original = settings.adjust_lr == "original"
            factor = (
                math.sqrt(max(1, rows / columns))
                if original
                else 0.2 * math.sqrt(max(rows, columns))
            )
            decayed = expected[name] * (1 - RATES["matrix_lr"] * RATES["weight_decay"])
            moved = RATES["matrix_lr"] * factor * newton_schulz(update, settings.ns_steps)
            expected = {**expected, name: decayed - moved}
        optimizer.step()
    for name, parameter in matrices:
        moved = (expected[name] - start[name]).norm()
        assert (parameter.detach().double() - expected[name]).norm() < 0.03 * moved, name
        torch.testing.assert_close(
            optimizer.state[parameter]["momentum_buffer"].double(), buffers[name]
        )
        assert optimizer.state[parameter]["momentum_buffer"].dtype is torch.float32


def test_muon_of_an_orthogonal_gradient_has_a_closed_form():
    """Goal: all singular values of Q / |Q| are 1/sqrt(n), so the step is p(p(...)) of that number times Q.

    Red with one Newton-Schulz step less.
    """
    model = tiny_model()
    weight = model.model.layers[0].self_attn.q_proj.weight  # 16 x 16
    weight.data.zero_()
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    give_gradients(model, 0)
    weight.grad = 7.0 * q
    muon_optimizer(model).step()
    a, b, c = NS_COEFFICIENTS
    x = 1 / math.sqrt(16)
    for _ in range(MUON.ns_steps):
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(weight.detach(), -RATES["matrix_lr"] * x * q, rtol=0, atol=3e-3)


def test_the_combined_step_is_torch_s_own_two(tmp_path):
    """Goal: bit for bit torch.optim.Muon on the matrices and torch.optim.AdamW on the rest, at nanochat's rates for
    the width. Red with the width's factor left out, and with vectors at matrix_lr."""
    model, other = tiny_model(tied=False), tiny_model(tied=False)
    optimizer = muon_optimizer(model, width_reference=64)  # hidden_size is 16: a factor of 2
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        *[("matrices", 0.1), ("embeddings", 0.4), ("unembedding", 0.6), ("vectors", 0.1)]
    ]
    members = {group["name"]: group["params"] for group in parameter_groups(other, **RATES)}
    muon = torch.optim.Muon(members["matrices"], lr=0.1, weight_decay=0.5, momentum=0.9)
    adamw = torch.optim.AdamW(
        [
            {"params": members["embeddings"], "lr": 0.4, "weight_decay": 0.5},
            {"params": members["unembedding"], "lr": 0.6, "weight_decay": 0.5},
            {"params": members["vectors"], "lr": 0.1, "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        fused=True,
    )
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(other, seed)
        for one in (optimizer, muon, adamw):
            one.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_muon_resumes_bit_for_bit(tmp_path):
    """Goal: 2 + load + 2 steps equal 4, schedule included; a checkpoint is nothing special. Red without _share() after
    loading: the two optimizers go on from no state."""

    def backend(seed=0):
        model = tiny_model(seed)
        made = tiny_backend(
            tmp_path,
            model=model,
            optimizer=muon_optimizer(model),
            lr_schedule=lambda s: 1 / (1 + s),
        )
        return made

    async def steps(backend, seeds):
        return [await train_step(backend, sft_batch(seed=seed), None) for seed in seeds]

    whole = backend()
    anyio.run(steps, whole, range(2))
    path = anyio.run(whole.save_checkpoint, 2, {})
    metrics = anyio.run(steps, whole, range(2, 4))
    resumed = backend(seed=1)
    anyio.run(resumed.load_checkpoint, path)
    assert anyio.run(steps, resumed, range(2, 4)) == metrics
    assert metrics[-1]["lr"] == pytest.approx(0.1 / 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )
    assert {v.dtype for state in resumed.optimizer.state.values() for v in state.values()} == {
        torch.float32
    }


def test_a_state_of_the_other_kind_is_refused():
    """Goal: AdamW never starts from Muon's momenta, nor the other way. Red without the hook: KeyError at the step."""
    model = tiny_model()
    muon, adamw = muon_optimizer(model), build_optimizer(model, **RATES, **ADAMW)
    for one, other in ((muon, adamw), (adamw, muon)):
        with pytest.raises(
            CheckpointError,
            match=r"saved for the parameter groups matrices \((muon|adamw)\), embed",
        ):
            one.load_state_dict(copy.deepcopy(other.state_dict()))


def test_muon_refuses_what_is_no_matrix():
    """Goal: a stack of experts is named, not silently left to another rule. Red without the check: torch's own words
    name no parameter."""
    model = tiny_model()
    model.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts has shape \(2, 3, 4\): Muon"):
        muon_optimizer(model)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.1464466094067263, 0.0]),
    ],
)
def test_lr_factor(schedule, expected):
    """Goal: warm-up over a third of six steps, then each schedule to its end. Red with the warm-up starting at 0/n."""
    factors = [
        lr_factor(step, total_steps=6, warmup_frac=1 / 3, schedule=schedule) for step in range(7)
    ]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_lr_factor_at_the_edges():
    """Goal: no warm-up, only warm-up and steps past the end stay defined. Red without the max(1, …)."""
    assert lr_factor(0, total_steps=4, warmup_frac=0.0, schedule="linear") == 1.0
    assert lr_factor(3, total_steps=4, warmup_frac=1.0, schedule="linear") == 1.0
    assert lr_factor(9, total_steps=4, warmup_frac=1.0, schedule="cosine") == 0.0
    with pytest.raises(
        ValueError, match="schedule='wsd': needs one of 'constant', 'linear', 'cosine'"
    ):
        lr_factor(0, total_steps=4, warmup_frac=0.0, schedule="wsd")


@pytest.mark.parametrize("shape", [(3, 5), (6, 4), (4, 4), (1, 7)])
def test_matrices_of_one_shape_are_orthogonalized_together(shape):
    """Goal: a stack gives each matrix what it gets alone, in float64 to 1e-12. Red with one norm for the stack."""
    stack = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack *= torch.tensor([1.0, 100.0, 1e-3, 0.0], dtype=torch.float64)[:, None, None]
    together = orthogonalize(stack, NS_COEFFICIENTS, 5, NS_EPS)
    for matrix, found in zip(stack, together, strict=True):
        torch.testing.assert_close(
            found, orthogonalize(matrix, NS_COEFFICIENTS, 5, NS_EPS), rtol=1e-12, atol=1e-12
        )


def test_muon_iterates_once_for_each_shape(monkeypatch):
    """Goal: where matrices go together, batched products alone, and each moves as it would by itself, within bfloat16.

    Red with a loop over matrices, and with the updates of another shape.
    """
    alone, model = tiny_model(), tiny_model()
    give_gradients(alone, 0)
    muon_optimizer(alone).step()
    monkeypatch.setattr("rollouts.training.optim._together", lambda parameter: True)
    optimizer = muon_optimizer(model)
    give_gradients(model, 0)
    matrices = next(
        group["params"] for group in optimizer.param_groups if group["name"] == "matrices"
    )
    shapes = {matrix.shape for matrix in matrices}
    with torch.profiler.profile() as profile:
        optimizer.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert len(matrices) > len(shapes)
    assert counts["aten::baddbmm"] == len(shapes) * 5 * 2 and "aten::addmm" not in counts
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * RATES["matrix_lr"])
