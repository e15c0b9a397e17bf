"""Parameter groups, the optimizer and the learning-rate schedule. Plain keyword arguments, no config objects."""

import math

import torch
from torch import nn

SCHEDULES = ("constant", "linear", "cosine")


def lr_factor(step: int, *, total_steps: int, warmup_frac: float, schedule: str) -> float:
    """The factor on every learning rate for optimizer step `step`, counted from 0.

    Rises linearly from 0 over the first `round(warmup_frac * total_steps)` steps, of which the first already moves
    (1/n, not 0). Then "constant" stays at 1; "linear" and "cosine" fall from 1 to reach 0 at `total_steps`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: needs one of {', '.join(map(repr, SCHEDULES))}")
    warmup_steps = round(warmup_frac * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    model: nn.Module, *, matrix_lr: float, embedding_lr: float, unembedding_lr: float, weight_decay: float
) -> list[dict]:
    """Every trainable parameter exactly once, as torch optimizer groups with a "name": empty ones are left out.

    "matrices", "embeddings" (the input embedding, and an output head tied to it), "unembedding" (a head of its own),
    and "vectors": norms and biases, which follow `matrix_lr` and are not decayed.
    `model` is a transformers model: `get_input_embeddings()`, `get_output_embeddings()`.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head_module = model.get_output_embeddings()  # type: ignore[operator]
    head = None if head_module is None or head_module.weight is embedding else head_module.weight
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "unembedding": [], "vectors": []}
    for parameter in model.parameters():  # a tied parameter comes once
        if not parameter.requires_grad:
            continue
        if parameter is embedding:
            members["embeddings"].append(parameter)
        elif parameter is head:
            members["unembedding"].append(parameter)
        else:
            members["matrices" if parameter.ndim >= 2 else "vectors"].append(parameter)
    rates = {"embeddings": embedding_lr, "unembedding": unembedding_lr}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name, matrix_lr),
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(
    model: nn.Module,
    *,
    kind: str = "adamw",
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`. Its state has the parameters' dtype, so give it a float32 model."""
    if kind != "adamw":
        raise ValueError(f"kind={kind!r}: needs 'adamw'")
    groups = parameter_groups(
        model,
        matrix_lr=matrix_lr,
        embedding_lr=embedding_lr,
        unembedding_lr=unembedding_lr,
        weight_decay=weight_decay,
    )
    if not groups:
        raise ValueError("the model has no parameter with requires_grad=True, so there is nothing to train")
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, fused=True)
