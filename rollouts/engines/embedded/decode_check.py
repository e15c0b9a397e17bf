"""A check at start: step-by-step decoding agrees with the model's own forward pass."""

import numpy as np
import torch

from rollouts.engines.embedded.batch import BatchRow, FinishReason, PromptJob, RunningBatch
from rollouts.engines.embedded.generate_request import PromptRequest, SamplingParams
from rollouts.engines.embedded.sampling import row_keys
from rollouts.engines.embedded.served_model import Served, ServedModelError

TOLERANCE_FP32, TOLERANCE_HALF = 1e-3, 0.3  # of a log-prob


def check_decode(served: Served, batch: RunningBatch) -> None:
    """Decode a few tokens with the empty `batch` and compare their log-probs; this also warms the model up.

    Raises ServedModelError where they differ: the trainer would score such tokens otherwise.
    """
    ids = tuple(
        np.random.default_rng(0)
        .integers(served.vocab_size, size=min(6, served.context_length - 2))
        .tolist()
    )
    request = PromptRequest(
        "check", ids, SamplingParams(temperature=0.0, ignore_eos=True), 2, True, len(ids)
    )
    batch.join(
        [BatchRow(PromptJob(request, lambda _: None, [None]), 0, row_keys(0, 1)[0])], "check"
    )
    ended: list[tuple[BatchRow, FinishReason]] = []
    while not ended:
        ended = batch.step()
    batch.prefilled_tokens = 0
    row = ended[0][0]
    expected = served.input_logprobs((*ids, *row.output_ids))[len(ids) - 1 :]
    worst = max(abs(ours - theirs) for ours, theirs in zip(row.logprobs, expected, strict=True))
    allowed = TOLERANCE_FP32 if served.dtype == torch.float32 else TOLERANCE_HALF
    if not worst <= allowed:
        name = type(served.model).__name__
        raise ServedModelError(
            f"{served.path}: {name} decodes with log-probs off by {worst:.2g}: cannot be served"
        )
