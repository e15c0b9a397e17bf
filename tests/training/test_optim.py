"""Parameter groups cover every parameter once, schedules are their formulas."""

import pytest
import torch

from rollouts.training.optim import build_optimizer, lr_factor, parameter_groups
from tests.training.tiny import tiny_model

RATES = {"matrix_lr": 0.1, "embedding_lr": 0.2, "unembedding_lr": 0.3, "weight_decay": 0.5}


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
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.7, 0.8, 1e-3)}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {optimizer.state[p][key].dtype for p in model.parameters() for key in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }
    with pytest.raises(ValueError, match="kind='muon': needs 'adamw'"):
        build_optimizer(model, kind="muon", **RATES, beta1=0.9, beta2=0.95, eps=1e-8)


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
    factors = [lr_factor(step, total_steps=6, warmup_frac=1 / 3, schedule=schedule) for step in range(7)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_lr_factor_at_the_edges():
    """Goal: no warm-up, only warm-up and steps past the end stay defined. Red without the max(1, …)."""
    assert lr_factor(0, total_steps=4, warmup_frac=0.0, schedule="linear") == 1.0
    assert lr_factor(3, total_steps=4, warmup_frac=1.0, schedule="linear") == 1.0
    assert lr_factor(9, total_steps=4, warmup_frac=1.0, schedule="cosine") == 0.0
    with pytest.raises(ValueError, match="schedule='wsd': needs one of 'constant', 'linear', 'cosine'"):
        lr_factor(0, total_steps=4, warmup_frac=0.0, schedule="wsd")
