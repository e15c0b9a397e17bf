"""Every loss that TRL has too, against what TRL computed: peers/trl_losses.json, written by peers/trl_losses.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rollouts.training.rl_losses import policy_loss

RECORD = json.loads((Path(__file__).parent / "peers" / "trl_losses.json").read_text())
GIVEN = RECORD["inputs"]
PROMPT, WIDTH = RECORD["shape"]["prompt"], RECORD["shape"]["prompt"] + RECORD["shape"]["completion"]
OURS: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "ppo", "aggregation": "sequence_mean_token_mean"},
    "dapo_clip_higher": {"loss": "ppo", "clip_range": (0.2, 0.28)},
    "dr_grpo": {
        "loss": "ppo",
        "aggregation": "constant_length",
        "length_norm": RECORD["shape"]["max_completion_length"],
    },
    "two_sided": {"loss": "ppo", "dual_clip": 1.5},
    "kl": {"loss": "ppo", "kl_coef": 0.1, "kl_kind": "k3"},
    "gspo": {"loss": "gspo", "clip_range": (0.1, 0.15), "aggregation": "sequence_mean_token_mean"},
    "cispo": {"loss": "cispo", "clip_range": (1.0, 0.3)},
    "token_sum": {"loss": "ppo", "aggregation": "sequence_mean_token_sum"},
    "entropy": {"loss": "ppo", "entropy_coef": 0.05},
}


@pytest.mark.parametrize("case", RECORD["cases"])
def test_loss_and_gradient_are_trls(case: str) -> None:
    """Goal: the same loss and gradient as TRL's in float64, padding, clipping on both sides and all.

    Red for each case with another's options: no two agree to 1e-6.
    """
    logits = torch.tensor(GIVEN["logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(GIVEN["labels"])
    positions = torch.arange(WIDTH)
    mask = ((positions >= PROMPT) & (positions < PROMPT + torch.tensor(GIVEN["lengths"])[:, None])).double()
    own = torch.log_softmax(logits.detach()[:, :-1], -1).gather(-1, labels[:, 1:, None]).squeeze(-1)
    old, ref = torch.zeros(2, *labels.shape, dtype=torch.float64)
    old[:, PROMPT:] = own[:, PROMPT - 1 :] + torch.tensor(GIVEN["old_noise"], dtype=torch.float64)
    ref[:, PROMPT:] = own[:, PROMPT - 1 :] + torch.tensor(GIVEN["ref_noise"], dtype=torch.float64)
    loss = policy_loss(
        logits,
        labels,
        mask,
        torch.tensor(GIVEN["advantages"], dtype=torch.float64),
        old_log_probs=old,
        ref_log_probs=ref,
        **OURS[case],
    )
    loss.backward()
    expected = RECORD["cases"][case]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-12)
    gradient = logits.grad[:, PROMPT - 1 : -1].gather(-1, labels[:, PROMPT:, None]).squeeze(-1)
    torch.testing.assert_close(gradient, torch.tensor(expected["gradient"], dtype=torch.float64), rtol=0, atol=1e-11)
    assert RECORD["source"].startswith("trl 1.16")
    others = [other["loss"] for name, other in RECORD["cases"].items() if name != case]
    assert min(abs(other - expected["loss"]) for other in others) > 1e-6
