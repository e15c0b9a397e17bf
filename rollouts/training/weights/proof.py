"""Prove that an engine serves the trainer's weights: both score the same fixed tokens. Pure; natural logs.

The version that a server reports is only its name; log-probs show what it computes. (SGLang's own /weights_checker does
not run on a CPU, and a checksum would miss a weight that was loaded to the wrong place.)
"""

import math
import random
from collections.abc import Mapping, Sequence

import torch

from rollouts.training.seams import Batch

PROBE_TOKENS = 16
_SEED = 20240607
# By the coarser dtype of the two sides: the mean |difference| of log-probs that rounding alone explains
TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
# By dtype: if the trainer's log-probs moved further since it last published, equal bits at the engine are old weights
MOVED: Mapping[str, float] = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05}


def probe_ids(vocab_size: int) -> list[int]:
    """Return PROBE_TOKENS token ids, the same for every run."""
    draw = random.Random(_SEED)
    return [draw.randrange(vocab_size) for _ in range(PROBE_TOKENS)]


def probe_batch(ids: Sequence[int]) -> Batch:
    """Return the ids as a batch of one sequence, for a backend's `log_probs`."""
    ids_1T = torch.tensor([list(ids)])
    return {"input_ids": ids_1T, "labels": ids_1T, "loss_mask": torch.ones(ids_1T.shape)}


def disagreement(
    expected: Sequence[float],
    served: Sequence[float],
    dtype: str,
    *,
    before: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str | None:
    """Return in words what shows that an engine does not serve the trainer's weights; None if nothing does.

    `expected` are the trainer's log-probs of the probe, `served` the engine's. `before` are the two at this engine's
    last proof.
    """
    apart = [abs(ours - theirs) for ours, theirs in zip(expected, served, strict=True)]
    mean = sum(apart) / len(apart)
    if not mean <= TOLERANCE[dtype]:  # nan too
        worst = max(
            range(len(apart)), key=lambda at: math.inf if math.isnan(apart[at]) else apart[at]
        )
        return (
            f"its log-probs of the probe differ from the trainer's by {mean:.3g} on average (at most "
            f"{apart[worst]:.3g}: {served[worst]:.6g}, the trainer has {expected[worst]:.6g}); {dtype} explains "
            f"{TOLERANCE[dtype]:g}"
        )
    if before is not None:
        moved = max(abs(now - then) for now, then in zip(expected, before[0], strict=True))
        if list(served) == list(before[1]) and moved > MOVED[dtype]:
            return (
                "its log-probs of the probe are those of the weights before, where the trainer's"
                f" moved by {moved:.3g}"
            )
    return None
