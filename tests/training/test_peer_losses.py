"""Every loss that TRL has too, against what TRL computes: as recorded in peers/trl_losses.json, and live.

Live, TRL's own code runs on random inputs and random options.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.training.rl_losses import policy_loss
from tests.training.peers.trl_losses import COMPLETION, PROMPT, make_inputs, trl_loss

RECORD = json.loads((Path(__file__).parent / "peers" / "trl_losses.json").read_text())
MAX_COMPLETION = RECORD["shape"]["max_completion_length"]
OURS: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "ppo", "aggregation": "sequence_mean_token_mean"},
    "dapo_clip_higher": {"loss": "ppo", "clip_range": (0.2, 0.28)},
    "dr_grpo": {
        "loss": "ppo",
        "aggregation": "constant_length",
        "length_norm": MAX_COMPLETION,
    },
    "two_sided": {"loss": "ppo", "dual_clip": 1.5},
    "kl": {"loss": "ppo", "kl_coef": 0.1, "kl_kind": "k3"},
    "gspo": {"loss": "gspo", "clip_range": (0.1, 0.15), "aggregation": "sequence_mean_token_mean"},
    "cispo": {"loss": "cispo", "clip_range": (1.0, 0.3)},
    "token_sum": {"loss": "ppo", "aggregation": "sequence_mean_token_sum"},
    "entropy": {"loss": "ppo", "entropy_coef": 0.05},
}


AGGREGATION = {  # TRL's loss_type -> our shares
    "grpo": {"aggregation": "sequence_mean_token_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dapo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "constant_length", "length_norm": MAX_COMPLETION},
    "luspo": {"aggregation": "sequence_mean_token_sum"},
    "cispo": {"aggregation": "token_mean"},
}


def our_loss(inputs: dict[str, Any], options: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Our loss in float64, and its gradient at each completion token's own logit."""
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(inputs["labels"])
    positions = torch.arange(PROMPT + COMPLETION)
    mask = (
        (positions >= PROMPT) & (positions < PROMPT + torch.tensor(inputs["lengths"])[:, None])
    ).double()
    own = torch.log_softmax(logits.detach()[:, :-1], -1).gather(-1, labels[:, 1:, None]).squeeze(-1)
    old, ref = torch.zeros(2, *labels.shape, dtype=torch.float64)
    old[:, PROMPT:] = own[:, PROMPT - 1 :] + torch.tensor(inputs["old_noise"], dtype=torch.float64)
    ref[:, PROMPT:] = own[:, PROMPT - 1 :] + torch.tensor(inputs["ref_noise"], dtype=torch.float64)
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64)
    loss = policy_loss(
        logits, labels, mask, advantages, old_log_probs=old, ref_log_probs=ref, **options
    )
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad[:, PROMPT - 1 : -1].gather(
        -1, labels[:, PROMPT:, None]
    ).squeeze(-1)


def assert_equal(ours: tuple[float, torch.Tensor], theirs: dict[str, Any]) -> None:
    assert ours[0] == pytest.approx(theirs["loss"], abs=1e-12)
    gradient = torch.tensor(theirs["gradient"], dtype=torch.float64)
    torch.testing.assert_close(ours[1], gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", RECORD["cases"])
def test_loss_and_gradient_are_what_was_recorded_of_trl(case: str) -> None:
    """Goal: the same loss and gradient as TRL's in float64, padding, clipping on both sides and all.

    Red for each case with another's options: no two agree to 1e-6.
    """
    expected = RECORD["cases"][case]
    assert_equal(our_loss(RECORD["inputs"], OURS[case]), expected)
    assert RECORD["source"].startswith("trl 1.16")
    others = [other["loss"] for name, other in RECORD["cases"].items() if name != case]
    assert min(abs(other - expected["loss"]) for other in others) > 1e-6


@st.composite
def peer_options(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same loss as TRL's options and as ours. What they cannot both express is left out:

    TRL's entropy bonus is a mean over tokens whatever the loss, its sequence level is for "grpo" and "luspo", and
    two-sided clipping ("delta") is dual clip only where it lies above the upper clip.
    """
    kind = draw(st.sampled_from(sorted(AGGREGATION)))
    sequence_level = kind in ("grpo", "luspo") and draw(st.booleans())
    low, high = draw(st.floats(0.02, 0.5)), draw(st.floats(0.02, 0.5))
    theirs: dict[str, Any] = {"loss_type": kind, "epsilon_low": low, "epsilon_high": high}
    ours: dict[str, Any] = {
        "loss": "gspo" if sequence_level else "ppo",
        "clip_range": (low, high),
        **AGGREGATION[kind],
    }
    if sequence_level:
        theirs["importance_sampling_level"] = "sequence"
    if kind == "cispo":
        theirs["epsilon_high"] = 1 + high  # TRL's is the bound itself, not its distance from 1
        ours |= {"loss": "cispo", "clip_range": (1.0, high)}
    elif draw(st.booleans()):
        theirs["delta"] = ours["dual_clip"] = draw(st.floats(1.6, 3.0))
    if draw(st.booleans()):
        theirs["beta"] = ours["kl_coef"] = draw(st.floats(0.01, 1.0))
    if ours["aggregation"] == "token_mean" and draw(st.booleans()):
        theirs["entropy_coef"] = ours["entropy_coef"] = draw(st.floats(0.001, 0.5))
    return theirs, ours


@settings(max_examples=200, derandomize=True, database=None)
@given(seed=st.integers(0, 2**31), options=peer_options())
def test_loss_and_gradient_are_trls_on_random_inputs(seed: int, options: tuple[dict, dict]) -> None:
    """Goal: TRL's own `_compute_loss`, run here, gives our loss and gradient for any inputs and any common options.

    Red with the importance ratio of "gspo" a plain sum, with the KL's sign turned, with dual clip for A > 0 too.
    """
    theirs, ours = options
    inputs = make_inputs(seed)
    assert_equal(our_loss(inputs, ours), trl_loss(inputs, theirs))
