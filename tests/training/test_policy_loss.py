"""`policy_loss` in every form: closed forms, gradients, and independence of how a step is cut."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.training.backends.loss_function import LossFunction
from rollouts.training.loops.batching import split_batch
from rollouts.training.policy_loss import ClippedRatio, KLPenalty, RLLoss
from rollouts.training.rl_losses import (
    cispo_loss,
    grpo_loss,
    gspo_loss,
    policy_loss,
    ppo_loss,
    token_log_probs,
    trained_sequences,
    trained_tokens,
)

B, T, V = 3, 5, 7
EXTRAS = {"kl_coef": 0.3, "entropy_coef": 0.2}
FORMS: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo"},
    "tis": {"loss": "grpo", "importance": "token_truncate", "importance_cap": 1.5},
    "mis": {"loss": "grpo", "importance": "token_mask", "importance_cap": 1.5},
    "sequence_tis": {"loss": "grpo", "importance": "sequence_truncate", "importance_cap": 1.2},
    "sequence_mis": {"loss": "grpo", "importance": "sequence_mask", "importance_cap": 1.2},
    "ppo": {"loss": "ppo", "clip_range": 0.1},
    "dapo": {"loss": "ppo", "clip_range": (0.1, 0.3)},
    "dual_clip": {"loss": "ppo", "clip_range": 0.1, "dual_clip": 1.2},
    "gspo": {"loss": "gspo", "clip_range": (0.05, 0.1), "aggregation": "sequence_mean_token_mean"},
    "cispo": {"loss": "cispo", "clip_range": (0.9, 0.2)},
    "token_sum": {"loss": "ppo", "aggregation": "sequence_mean_token_sum"},
    "dr_grpo": {"loss": "ppo", "aggregation": "constant_length", "length_norm": 9.0},
    "k1": {"loss": "grpo", **EXTRAS, "kl_kind": "k1"},
    "k2": {"loss": "cispo", "clip_range": (0.9, 0.2), **EXTRAS, "kl_kind": "k2"},
    "k3": {"loss": "ppo", **EXTRAS, "kl_kind": "k3", "aggregation": "sequence_mean_token_mean"},
}
FORM = pytest.mark.parametrize("form", FORMS)


def inputs(
    seed: int = 0, lengths: tuple[tuple[int, int], ...] = ((2, 3), (1, 2), (1, 4))
) -> dict[str, Any]:
    """A batch in float64; `lengths` are (prompt, response) tokens of each row. Old and reference are own + noise."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + response for prompt, response in lengths)
    logits = torch.randn(len(lengths), width, V, dtype=torch.float64, generator=generator)
    labels = torch.randint(V, (len(lengths), width), generator=generator)
    positions = torch.arange(width)
    starts, sizes = torch.tensor(lengths).T[:, :, None]
    noise = 0.3 * torch.randn(2, len(lengths), width, dtype=torch.float64, generator=generator)
    own = token_log_probs(logits, labels, torch.ones(labels.shape))
    return {
        "logits": logits,
        "labels": labels,
        "loss_mask": ((positions >= starts) & (positions < starts + sizes)).double(),
        "advantages": torch.randn(len(lengths), dtype=torch.float64, generator=generator),
        "old_log_probs": own + noise[0],
        "ref_log_probs": own + noise[1],
    }


def by_hand(batch: dict[str, Any], options: dict[str, Any]) -> float:
    """The loss in plain Python, a sequence and a token at a time."""
    o = {
        "clip_range": 0.2,
        "aggregation": "token_mean",
        "importance": "none",
        "kl_kind": "k3",
        **options,
    }
    low, high = (
        o["clip_range"]
        if isinstance(o["clip_range"], tuple)
        else (o["clip_range"], o["clip_range"])
    )
    sequences = []
    for b, mask in enumerate(batch["loss_mask"].tolist()):
        tokens = [t for t in range(1, len(mask)) if mask[t]]
        if not tokens:
            continue
        probs = [torch.softmax(batch["logits"][b, t - 1], -1).tolist() for t in tokens]
        own = [math.log(p[int(batch["labels"][b, t])]) for p, t in zip(probs, tokens, strict=True)]
        ratios = [
            math.exp(lp - batch["old_log_probs"][b, t].item())
            for lp, t in zip(own, tokens, strict=True)
        ]
        product = math.prod(ratios)
        advantage, terms = batch["advantages"][b].item(), []
        for lp, p, ratio, t in zip(own, probs, ratios, tokens, strict=True):
            if o["loss"] == "grpo":
                weight = product if o["importance"].startswith("sequence") else ratio
                if o["importance"] == "none":
                    weight = 1.0
                elif weight > o["importance_cap"]:
                    weight = o["importance_cap"] if o["importance"].endswith("truncate") else 0.0
                term = -weight * advantage * lp
            elif o["loss"] == "cispo":
                term = -min(max(ratio, 1 - low), 1 + high) * advantage * lp
            else:
                r = product ** (1 / len(tokens)) if o["loss"] == "gspo" else ratio
                gain = min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)
                if "dual_clip" in o and advantage < 0:
                    gain = max(gain, o["dual_clip"] * advantage)
                term = -gain
            d = lp - batch["ref_log_probs"][b, t].item()
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[o["kl_kind"]]
            term += o.get("kl_coef", 0) * kl + o.get("entropy_coef", 0) * sum(
                q * math.log(q) for q in p
            )
            terms.append(term)
        sequences.append(terms)
    if o["aggregation"] == "token_mean":
        return sum(map(sum, sequences)) / sum(map(len, sequences))
    scale = {"sequence_mean_token_sum": lambda s: 1, "sequence_mean_token_mean": len}
    divisor = scale.get(o["aggregation"], lambda s: o["length_norm"])
    return sum(sum(s) / divisor(s) for s in sequences) / len(sequences)


@FORM
def test_closed_form(form: str) -> None:
    """Goal: every loss is what its paper says, token by token in plain Python.

    Red for each form with its own part changed: the bounds swapped, the product for the mean, the KL's sign, ....
    """
    for seed in range(3):
        batch = inputs(seed)
        assert policy_loss(**batch, **FORMS[form]).item() == pytest.approx(
            by_hand(batch, FORMS[form]), abs=1e-13
        )


@FORM
def test_gradient_against_finite_differences(form: str) -> None:
    """Goal: the gradient is the loss's own, or where a weight is a constant, that of the loss with it held.

    Red with the log-probs detached inside the ratio, and with cispo's or TIS's weight not detached.
    """
    batch, options = inputs(), FORMS[form]
    rest = {key: value for key, value in batch.items() if key != "logits"}
    logits = batch["logits"].requires_grad_()
    detached = options["loss"] == "cispo" or options.get("importance", "none") != "none"
    if not detached:
        assert torch.autograd.gradcheck(
            lambda x: policy_loss(logits=x, **rest, **options), (logits,)
        )
        return
    (gradient,) = torch.autograd.grad(policy_loss(logits, **rest, **options), logits)
    own = token_log_probs(logits, batch["labels"], torch.ones(B, T))
    held = by_constant_weights(batch, options, own)
    expected = torch.zeros_like(logits)
    for index in torch.cartesian_prod(torch.arange(B), torch.arange(T), torch.arange(V)).tolist():
        step = torch.zeros_like(logits)
        step[tuple(index)] = 1e-5
        sides = [held((logits + sign * step).detach()) for sign in (1, -1)]
        expected[tuple(index)] = (sides[0] - sides[1]) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def by_constant_weights(batch: dict[str, Any], options: dict[str, Any], own: torch.Tensor) -> Any:
    """The loss of other logits under the weights that the batch's own have: A x weight as advantages per token."""
    log_ratio = (own - batch["old_log_probs"]) * (batch["loss_mask"] != 0)
    if options["loss"] == "cispo":
        low, high = options["clip_range"]
        weights = log_ratio.exp().clamp(1 - low, 1 + high)
    else:
        if options["importance"].startswith("sequence"):
            log_ratio = log_ratio.sum(1, keepdim=True).expand(own.shape)
        ratio, cap = log_ratio.exp(), options["importance_cap"]
        weights = (
            ratio.clamp(max=cap)
            if options["importance"].endswith("truncate")
            else ratio * (ratio <= cap)
        )
    extras = {key: options[key] for key in ("kl_coef", "kl_kind", "entropy_coef") if key in options}
    zero = {**batch, "advantages": torch.zeros(B, dtype=torch.float64)}

    def loss(logits: torch.Tensor) -> torch.Tensor:
        log_probs = token_log_probs(logits, batch["labels"], torch.ones(B, T))
        terms = weights * batch["advantages"][:, None] * log_probs * batch["loss_mask"]
        return -terms.sum() / batch["loss_mask"].sum() + policy_loss(
            **{**zero, "logits": logits}, **extras
        )

    return loss


@FORM
@settings(max_examples=15)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=2, max_size=7
    ).filter(lambda rows: any(response for _, response in rows) and max(map(sum, rows)) > 1),
    seed=st.integers(0, 99),
    world_size=st.integers(1, 3),
    cut=st.sampled_from([(1, None), (2, None), (3, None), (None, None), (None, 4), (None, 9)]),
)
def test_a_step_is_the_same_however_it_is_cut(form, lengths, seed, world_size, cut) -> None:
    """Goal: no loss or gradient depends on micro-batch size, packing or rank count (open-instruct#1161).

    Red with the denominators left to each micro-batch: tokens_global, and sequences_global, not passed on.
    """
    batch = inputs(seed, tuple(lengths))
    logits = batch.pop("logits").requires_grad_()
    whole = policy_loss(logits, **batch, **FORMS[form])
    (expected,) = torch.autograd.grad(whole, logits)
    step = {
        **batch,
        "rows": torch.arange(len(lengths)),
        "attention_mask": torch.arange(logits.shape[1])
        < torch.tensor([sum(row) for row in lengths])[:, None],
        "tokens_global": trained_tokens(batch["loss_mask"]),
        "sequences_global": trained_sequences(batch["loss_mask"]),
    }
    total = torch.zeros_like(whole)
    for rank in range(world_size):
        options = {"micro_batch_size": cut[0], "micro_batch_tokens": cut[1]}
        for micro in split_batch(step, rank=rank, world_size=world_size, **options):
            if micro["labels"].shape[1] < 2:
                continue  # one token: a model's forward pass has nothing to predict
            own = logits[micro.pop("rows"), : micro.pop("attention_mask").shape[1]]
            total = total + policy_loss(own, **micro, **FORMS[form])
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@FORM
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_padding_is_never_touched(form: str, poison: float) -> None:
    """Goal: what is masked may hold anything, in the gradient too. Red with the mask multiplied after the exp."""
    batch = inputs()
    clean_logits = batch["logits"].clone().requires_grad_()
    clean = policy_loss(**{**batch, "logits": clean_logits}, **FORMS[form])
    clean.backward()
    untrained = batch["loss_mask"] == 0
    logits = batch["logits"].clone()
    logits[:, :-1][untrained[:, 1:]] = poison
    logits[:, -1] = poison
    logits.requires_grad_()
    poisoned = {
        key: batch[key].masked_fill(untrained, poison) for key in ("old_log_probs", "ref_log_probs")
    }
    loss = policy_loss(**{**batch, "logits": logits, **poisoned}, **FORMS[form])
    loss.backward()
    assert loss.item() == clean.item()
    torch.testing.assert_close(logits.grad, clean_logits.grad, rtol=0, atol=0)


@FORM
def test_far_off_policy_stays_finite(form: str) -> None:
    """Goal: log-ratios of ±500 give no inf x 0 gradient in float32. Red with exp() of the log-ratio as it is: NaN."""
    batch = {
        key: value.float() if value.is_floating_point() else value
        for key, value in inputs().items()
    }
    batch["old_log_probs"][0], batch["old_log_probs"][1] = -500.0, 500.0
    batch["ref_log_probs"][0], batch["ref_log_probs"][1] = 500.0, -500.0
    batch["advantages"][2] = 0.0
    batch["old_log_probs"][2] = -500.0
    logits = batch["logits"].requires_grad_()
    policy_loss(**batch, **FORMS[form]).backward()
    assert torch.isfinite(logits.grad).all()


def test_plain_forms_are_policy_loss() -> None:
    """Goal: the four named losses are what their docstrings say. Red with the aggregation left out of gspo_loss."""
    batch = inputs()
    del batch["ref_log_probs"]
    on_policy = {key: value for key, value in batch.items() if key != "old_log_probs"}
    paper = {"loss": "gspo", "clip_range": (3e-4, 4e-4), "aggregation": "sequence_mean_token_mean"}
    assert torch.equal(grpo_loss(**on_policy), policy_loss(**batch, loss="grpo"))
    assert torch.equal(
        ppo_loss(**batch, clip_range=0.1), policy_loss(**batch, loss="ppo", clip_range=0.1)
    )
    assert torch.equal(gspo_loss(**batch), policy_loss(**batch, **paper))
    assert torch.equal(
        cispo_loss(**batch), policy_loss(**batch, loss="cispo", clip_range=(1.0, 4.0))
    )


@pytest.mark.parametrize("form", ["ppo", "gspo", "cispo", "tis", "mis"])
def test_on_policy_gradients_are_grpos(form: str) -> None:
    """Goal: where sampler and policy agree every loss pulls alike. Red with a detached ratio (no gradient at all)."""
    batch = inputs(lengths=((2, 3), (1, 3), (1, 3)))  # equal lengths: the aggregations agree too
    batch["old_log_probs"] = token_log_probs(batch["logits"], batch["labels"], batch["loss_mask"])
    logits = batch["logits"].requires_grad_()
    (expected,) = torch.autograd.grad(policy_loss(**batch), logits)
    (gradient,) = torch.autograd.grad(policy_loss(**batch, **FORMS[form]), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """Goal: what ppo drops, cispo still trains on. Red with torch.minimum in cispo."""
    batch = inputs(lengths=((1, 2),))
    batch["advantages"][:] = 1.0
    batch["old_log_probs"] -= 5.0
    logits = batch["logits"].requires_grad_()
    (dropped,) = torch.autograd.grad(policy_loss(**batch, loss="ppo"), logits)
    (kept,) = torch.autograd.grad(policy_loss(**batch, loss="cispo"), logits)
    assert not dropped.any()
    assert kept[0, :2].abs().sum() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "pg"}, "loss='pg': needs one of 'grpo', 'ppo', 'gspo', 'cispo'"),
        (
            {"loss": "ppo", "importance": "token_mask"},
            "importance='token_mask': only for loss='grpo'",
        ),
        ({"loss": "cispo", "dual_clip": 3.0}, "dual_clip=3.0: only for loss='ppo' and 'gspo'"),
        ({"kl_coef": 0.1, "kl_kind": "k4"}, "kl_kind='k4': needs one of 'k1', 'k2', 'k3'"),
        ({"kl_coef": 0.1, "ref_log_probs": None}, "ref_log_probs=None: kl_coef=0.1 needs them"),
        ({"loss": "ppo", "old_log_probs": None}, "old_log_probs=None: loss='ppo' needs them"),
        (
            {"kl_coef": 0.1, "ref_log_probs": torch.zeros(B, T - 1)},
            r"ref_log_probs \(3, 4\): needs \(3, 5\)",
        ),
    ],
)
def test_what_is_missing_or_ignored_is_named(options: dict[str, Any], message: str) -> None:
    """Goal: no setting is silently without effect. Red with each check off."""
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**inputs(), **options})


def test_truncated_importance_is_decoupled_ppo_where_every_batch_is_used_once():
    """Goal: what docs/design/asynchronous.md says of samples from older weights: the gradient of AReaL's objective
    (2505.24298),
    E[w min(r A, clip(r) A)] with r to the policy that is trained and w from that to the sampler, is "token_truncate"'s.

    Red with the weight left out, and with a clip around the sampler in its place (`ppo`): samples here are far off.
    """
    given_inputs = inputs(seed=5)
    given_inputs["old_log_probs"] = given_inputs["old_log_probs"] - 0.4
    logits = given_inputs.pop("logits")
    found = logits.clone().requires_grad_()
    policy_loss(found, **given_inputs, **FORMS["tis"]).backward()

    decoupled = logits.clone().requires_grad_()
    labels, mask = given_inputs["labels"], given_inputs["loss_mask"]
    own = torch.log_softmax(decoupled[:, :-1], -1).gather(2, labels[:, 1:, None])[..., 0]
    proximal = own.detach()  # recomputed at the start of the batch, for which there is one update
    weight = (proximal - given_inputs["old_log_probs"][:, 1:]).exp().clamp(max=1.5)
    ratio = (own - proximal).exp()
    advantages = given_inputs["advantages"][:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-(weight * surrogate * mask[:, 1:]).sum() / mask[:, 1:].sum()).backward()
    assert (weight * mask[:, 1:] >= 1.5).any() and ((weight != 1.5) & (mask[:, 1:] > 0)).any()
    assert torch.allclose(found.grad, decoupled.grad, rtol=0, atol=1e-14)


def test_a_composed_loss_reads_the_keys_that_it_names() -> None:
    """Goal: a backend hands a composed loss what it takes of a batch, and a mistyped key is no silent default.

    Red with `**inputs` taken for any key: a batch's input_ids reached the loss.
    """
    loss = RLLoss(ClippedRatio(0.1), kl=KLPenalty(0.3))
    batch: Any = {**inputs(), "input_ids": None, "attention_mask": None}
    logits = batch.pop("logits")
    assert torch.equal(
        LossFunction(loss)(logits, batch),
        policy_loss(**inputs(), loss="ppo", clip_range=0.1, kl_coef=0.3),
    )
    with pytest.raises(TypeError, match="RLLoss: takes no old_logprobs"):
        loss(logits, batch["labels"], batch["loss_mask"], batch["advantages"], old_logprobs=None)  # type: ignore
    with pytest.raises(TypeError, match="policy_loss: unknown options entropy"):
        policy_loss(**inputs(), entropy=0.1)
