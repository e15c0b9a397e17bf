"""What TRL's GRPOTrainer computes on given inputs; run by hand, it records that into trl_losses.json beside this file:

    python tests/training/peers/trl_losses.py

TRL's `_compute_loss` runs as it stands; a stand-in for the trainer hands it log-probs and entropies of given logits.
`trl` itself is imported on the first call: it takes seconds.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PROMPT, COMPLETION, B, V = 2, 4, 5, 6
BASE: dict[str, Any] = {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo_clip_higher": {"epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "two_sided": {"delta": 1.5},
    "kl": {"beta": 0.1},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 0.1,
        "epsilon_high": 0.15,
    },
    # TRL's is the bound itself, not its distance from 1
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "token_sum": {"loss_type": "luspo"},
    "entropy": {"entropy_coef": 0.05},
}


def make_inputs(seed: int = 7) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    width = PROMPT + COMPLETION

    def normal(*shape: int, scale: float) -> list:
        return torch.randn(shape, generator=random).double().mul(scale).round(decimals=3).tolist()

    return {
        "logits": normal(B, width, V, scale=1.5),
        "labels": torch.randint(V, (B, width), generator=random).tolist(),
        # of the completions
        "lengths": torch.randint(1, COMPLETION + 1, (B,), generator=random).tolist(),
        "advantages": normal(B, scale=1.0),
        "old_noise": normal(B, COMPLETION, scale=0.4),  # old = own + noise
        "ref_noise": normal(B, COMPLETION, scale=0.4),
    }


def log_probs_and_entropies(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the completion's tokens, [B, COMPLETION] each."""
    all_log_probs = torch.log_softmax(logits[:, PROMPT - 1 : -1], -1)
    log_probs = all_log_probs.gather(-1, labels[:, PROMPT:, None]).squeeze(-1)
    return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1)


def trl_loss(given: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """TRL's loss, and its gradient at each completion token's own logit."""
    from trl import GRPOTrainer

    options = {**BASE, **case}
    logits = torch.tensor(given["logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(given["labels"])
    own, entropies = log_probs_and_entropies(logits, labels)
    mask = torch.arange(COMPLETION) < torch.tensor(given["lengths"])[:, None]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (own, entropies, None),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        accelerator=SimpleNamespace(
            gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor, num_processes=1
        ),
        args=SimpleNamespace(delta=options.get("delta"), use_bias_correction_kl=False),
        aux_loss_enabled=False,
        beta=options.get("beta", 0.0),
        current_gradient_accumulation_steps=1,
        entropy_coef=options.get("entropy_coef", 0.0),
        _entropy_bonus_enabled="entropy_coef" in options,
        use_adaptive_entropy=False,
        epsilon_low=options["epsilon_low"],
        epsilon_high=options["epsilon_high"],
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        loss_type=options["loss_type"],
        model=SimpleNamespace(training=False),
        max_completion_length=COMPLETION + 3,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    batch = {
        "prompt_ids": labels[:, :PROMPT],
        "prompt_mask": torch.ones(B, PROMPT),
        "completion_ids": labels[:, PROMPT:],
        "completion_mask": mask.double(),
        "advantages": torch.tensor(given["advantages"], dtype=torch.float64),
        "old_per_token_logps": own.detach() + torch.tensor(given["old_noise"], dtype=torch.float64),
        "ref_per_token_logps": own.detach() + torch.tensor(given["ref_noise"], dtype=torch.float64),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    loss.backward()
    gradient = logits.grad[:, PROMPT - 1 : -1].gather(-1, labels[:, PROMPT:, None]).squeeze(-1)
    return {
        "loss": loss.item(),
        "gradient": [[round(value, 12) for value in row] for row in gradient.tolist()],
    }


def main() -> None:
    import trl

    given = make_inputs()
    record = {
        "source": f"trl {trl.__version__} GRPOTrainer._compute_loss, torch {torch.__version__}, float64",
        "shape": {
            "prompt": PROMPT,
            "completion": COMPLETION,
            "max_completion_length": COMPLETION + 3,
        },
        "inputs": given,
        "cases": {name: trl_loss(given, case) for name, case in CASES.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
