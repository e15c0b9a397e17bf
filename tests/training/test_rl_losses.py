"""The losses against closed forms in float64, and every trap of masks, shifts and padding."""

import math

import pytest
import torch

from rollouts.training.rl_losses import (
    grpo_loss,
    k3,
    policy_statistics,
    ppo_loss,
    sft_loss,
    trained_tokens,
)

B, T, V = 3, 5, 7


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(B, T, V, dtype=torch.float64, generator=generator),
        "labels": torch.randint(V, (B, T), generator=generator),
        "loss_mask": torch.tensor(
            [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 0, 1, 0]], dtype=torch.float64
        ),
    }


def rl_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    return {
        **inputs(seed),
        "advantages": torch.tensor([0.7, -1.3, 0.4], dtype=torch.float64),
        "old_log_probs": -2 + torch.randn(B, T, dtype=torch.float64, generator=generator),
    }


def trained(
    batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> list[tuple[int, int, float]]:
    """(row, position, log-prob) of each trained token, one at a time in plain Python."""
    found = []
    for b in range(B):
        for t in range(1, T):
            if batch["loss_mask"][b, t]:
                scores = [value / temperature for value in batch["logits"][b, t - 1].tolist()]
                log_z = math.log(sum(math.exp(score) for score in scores))
                found.append((b, t, scores[int(batch["labels"][b, t])] - log_z))
    return found


def test_sft_loss_is_the_mean_nll_of_the_next_tokens():
    """Goal: loss and shift are right. Red with labels at `logits[:, t]` (no shift) and with `logits[:, 1:]`."""
    batch = inputs()
    tokens = trained(batch)
    assert len(tokens) == 7  # the mask at position 0 counts for nothing
    expected = -sum(log_prob for _, _, log_prob in tokens) / 7
    assert sft_loss(**batch).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_grpo_loss_is_the_closed_form(temperature: float):
    """Goal: -mean(A log p) at the sampler's temperature. Red with the temperature left out."""
    batch = rl_inputs()
    del batch["old_log_probs"]
    tokens = trained(batch, temperature)
    expected = -sum(batch["advantages"][b].item() * log_prob for b, _, log_prob in tokens) / len(
        tokens
    )
    assert grpo_loss(**batch, temperature=temperature).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("clip_range", [0.2, 0.05, 10.0])
def test_ppo_loss_is_the_closed_form(clip_range: float):
    """Goal: the clipped surrogate, old log-probs aligned to tokens. Red with old_log_probs[:, :-1], and with max."""
    batch = rl_inputs()
    total = 0.0
    for b, t, log_prob in trained(batch):
        advantage = batch["advantages"][b].item()
        ratio = math.exp(log_prob - batch["old_log_probs"][b, t].item())
        total += min(ratio * advantage, min(max(ratio, 1 - clip_range), 1 + clip_range) * advantage)
    assert ppo_loss(**batch, clip_range=clip_range).item() == pytest.approx(-total / 7, abs=1e-14)


@pytest.mark.parametrize("loss_fn", [sft_loss, grpo_loss, ppo_loss])
def test_gradients_against_finite_differences(loss_fn):
    """Goal: the gradient is the loss's own. Red with the log-probs detached inside the ratio."""
    batch = rl_inputs()
    names = {sft_loss: (), grpo_loss: ("advantages",), ppo_loss: ("advantages", "old_log_probs")}[
        loss_fn
    ]
    rest = {key: batch[key] for key in ("labels", "loss_mask", *names)}
    logits = batch["logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_fn(logits=x, **rest), (logits,))


def test_ppo_ratio_moves_with_the_policy():
    """Goal: the ratio is to the sampler, so raising a token's probability raises it (torchforge#571).

    Red with `log_prob - log_prob.detach()` in place of the old log-probs: the loss then stays the same.
    """
    batch = rl_inputs()
    moved = batch["logits"].clone()
    b, t, _ = trained(batch)[0]
    moved[b, t - 1, batch["labels"][b, t]] += 0.01
    before = ppo_loss(**batch, clip_range=100.0)
    after = ppo_loss(**{**batch, "logits": moved}, clip_range=100.0)
    assert after < before  # advantage 0.7 > 0: likelier is better


def test_ppo_on_policy_has_the_gradient_of_grpo():
    """Goal: with the sampler's log-probs equal to the policy's the two losses pull alike. Red with a wrong shift."""
    batch = rl_inputs()
    old = torch.zeros(B, T, dtype=torch.float64)
    for b, t, log_prob in trained(batch):
        old[b, t] = log_prob
    batch["old_log_probs"] = old
    logits = batch["logits"].requires_grad_()
    (ppo_gradient,) = torch.autograd.grad(ppo_loss(**batch), logits)
    del batch["old_log_probs"]
    (grpo_gradient,) = torch.autograd.grad(grpo_loss(**batch), logits)
    torch.testing.assert_close(ppo_gradient, grpo_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_padding_is_never_touched(poison: float):
    """Goal: what is masked may hold anything. Red with the mask multiplied after the softmax (a NaN gradient)."""
    batch = rl_inputs()
    clean = ppo_loss(**batch)
    logits, old = batch["logits"].clone(), batch["old_log_probs"].clone()
    untrained = batch["loss_mask"][:, 1:] == 0
    logits[:, :-1][untrained] = poison
    logits[:, -1] = poison
    old[:, 1:][untrained] = poison
    old[:, 0] = poison
    logits.requires_grad_()
    poisoned = {**batch, "logits": logits, "old_log_probs": old}
    loss = ppo_loss(**poisoned)
    loss.backward()
    assert loss.item() == clean.item()
    assert torch.isfinite(logits.grad).all()
    assert policy_statistics(**without(poisoned, "advantages")) == policy_statistics(
        **without(batch, "advantages")
    )


def test_the_last_token_is_trained():
    """Goal: the response's EOS, the last token of its row, takes part (verl#3562). Red with loss_mask[:, :-1]."""
    logits = torch.zeros(1, 3, V, dtype=torch.float64)
    logits[0, 1, 2] = 3.0
    mask = torch.tensor([[0.0, 0.0, 1.0]])
    loss = sft_loss(logits=logits, labels=torch.tensor([[4, 5, 2]]), loss_mask=mask)
    assert loss.item() == pytest.approx(math.log(math.exp(3) + V - 1) - 3)


def test_micro_batches_add_up_by_tokens_global():
    """Goal: one global token mean, no mean of means (open-instruct#1161). Red with tokens_global ignored."""
    batch = rl_inputs()
    whole = ppo_loss(**batch)
    total = trained_tokens(batch["loss_mask"])
    parts = [
        ppo_loss(**{key: value[rows] for key, value in batch.items()}, tokens_global=total)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert total == 7
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-14)


def test_length_does_not_weigh_tokens():
    """Goal: each token weighs the same, no 1/|o| (understand-r1-zero#10). Red with a mean per sequence first."""
    logits = torch.zeros(2, 5, V, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0.0, 1, 0, 0, 0], [0.0, 1, 1, 1, 1]])
    labels = torch.zeros(2, 5, dtype=torch.long)
    grpo_loss(logits=logits, labels=labels, loss_mask=mask, advantages=torch.ones(2)).backward()
    torch.testing.assert_close(logits.grad[0, 0], logits.grad[1, 3])


def test_mask_weights_scale_tokens():
    """Goal: a fractional mask is a weight, in the loss and in its denominator. Red with the mask used as a bool."""
    batch = inputs()
    doubled = {**batch, "loss_mask": batch["loss_mask"] * 2}
    assert sft_loss(**doubled).item() == pytest.approx(sft_loss(**batch).item(), abs=1e-14)
    assert trained_tokens(doubled["loss_mask"]) == 14
    weighted = sft_loss(**doubled, tokens_global=7.0)
    assert weighted.item() == pytest.approx(2 * sft_loss(**batch).item(), abs=1e-14)


def test_bfloat16_logits_give_float32_log_probs():
    """Goal: the softmax is taken in float32. Red with `dtype=` dropped from log_softmax: three digits are lost."""
    batch = inputs()
    rough = batch["logits"].to(torch.bfloat16)
    loss = sft_loss(**{**batch, "logits": rough, "loss_mask": batch["loss_mask"].float()})
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(
        sft_loss(**{**batch, "logits": rough.double()}).item(), abs=1e-6
    )


def test_a_batch_without_trained_tokens():
    """Goal: an error alone, but a zero with a gradient as one micro-batch of a step. Red with 0/0 (NaN)."""
    batch = inputs()
    batch["loss_mask"] = torch.zeros(B, T)
    batch["loss_mask"][:, 0] = 1.0
    with pytest.raises(ValueError, match="no trained token"):
        sft_loss(**batch)
    logits = batch["logits"].requires_grad_()
    loss = sft_loss(**batch, tokens_global=5.0)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(B, T - 1, dtype=torch.long)}, r"labels \(3, 4\): needs \(3, 5\)"),
        ({"loss_mask": torch.ones(B, T + 1)}, r"loss_mask \(3, 6\): needs \(3, 5\)"),
        ({"advantages": torch.ones(B, T - 1)}, r"advantages \(3, 4\): needs \(3, 5\)"),
        ({"advantages": torch.ones(B + 1)}, r"advantages \(4,\): needs \(3,\)"),
        ({"old_log_probs": torch.zeros(B, T - 1)}, r"old_log_probs \(3, 4\): needs \(3, 5\)"),
        ({"temperature": 0.0}, "temperature=0.0: needs > 0"),
        ({"tokens_global": 0.0}, "tokens_global=0.0: needs > 0"),
        ({"logits": torch.zeros(B, 1, V)}, r"needs \[B, T, V\] with T >= 2"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    """Goal: no silent broadcasting. Red with the shape checks off: advantages of other rows train on something else."""
    with pytest.raises(ValueError, match=message):
        ppo_loss(**{**rl_inputs(), **change})


def test_k3_vector():
    """Goal: the published vector: log p [-1, -2] against [-1.5, -1.5]. Red with the arguments swapped."""
    values = k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]))
    torch.testing.assert_close(values, torch.tensor([0.1065, 0.1487]), rtol=0, atol=5e-5)


def test_statistics_are_sums_over_trained_tokens():
    """Goal: each statistic is its closed form. Red with the entropy's sign flipped, and with the padding counted."""
    batch = without(rl_inputs(), "advantages")
    batch["logits"][..., 3] = -math.inf  # a token the sampler cannot draw: 0 log 0 is 0
    batch["labels"][batch["labels"] == 3] = 2
    tokens = trained(batch, temperature=0.8)
    sums = policy_statistics(**batch, temperature=0.8, clip_range=0.3)
    differences = [log_prob - batch["old_log_probs"][b, t].item() for b, t, log_prob in tokens]
    entropy = 0.0
    for b, t, _ in tokens:
        scores = torch.softmax(batch["logits"][b, t - 1] / 0.8, -1).tolist()
        entropy -= sum(p * math.log(p) for p in scores if p)
    assert sums == pytest.approx(
        {
            "tokens": 7,
            "entropy": entropy,
            "logp": sum(log_prob for _, _, log_prob in tokens),
            "logp_diff_abs": sum(map(abs, differences)),
            "kl_sampler": sum(math.exp(d) - 1 - d for d in differences),
            "clip_fraction": sum(abs(math.exp(d) - 1) > 0.3 for d in differences),
        },
        abs=1e-12,
    )


def test_statistics_do_not_depend_on_chunks(monkeypatch):
    """Goal: looking at the tokens in pieces changes nothing. Red with the last piece left out."""
    batch = without(rl_inputs(), "advantages")
    whole = policy_statistics(**batch)
    monkeypatch.setattr("rollouts.training.log_probs._CHUNK_ELEMENTS", 2 * V)
    assert policy_statistics(**batch) == pytest.approx(whole, abs=1e-12)


def test_statistics_are_exactly_zero_on_policy():
    """Goal: KL and |Δlogp| are exactly 0 where sampler and trainer agree (slime#780). Red with a float64 softmax."""
    batch = without(rl_inputs(), "advantages")
    batch["logits"] = batch["logits"].float()
    old = torch.zeros(B, T)
    log_probs = torch.log_softmax(batch["logits"], -1)
    for b, t, _ in trained(batch):
        old[b, t] = log_probs[b, t - 1, batch["labels"][b, t]]
    sums = policy_statistics(**{**batch, "old_log_probs": old})
    assert (sums["kl_sampler"], sums["logp_diff_abs"], sums["clip_fraction"]) == (0.0, 0.0, 0.0)


def without(batch: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != key}
