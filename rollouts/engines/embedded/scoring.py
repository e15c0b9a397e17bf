"""Log-probs of finished rows by the trainer's own forward pass, so that both agree to the last bit.

Decoding sees one token at a time and rounds a little differently than a pass over the whole sequence (about 1e-7). In
float32 on a CPU, with one thread each, matrix products over enough rows give every row the same bits whatever stands
beside it; so a sequence scored here and by the trainer with the same weights has the same log-probs, exactly.
"""

from collections.abc import Sequence

import torch

from rollouts.engines.embedded import attention
from rollouts.engines.embedded.batch import Row
from rollouts.engines.embedded.model import Served
from rollouts.training import forward
from rollouts.training.loops.packing import pack_best_fit

PASS_TOKENS_MAX = 4096  # of one pass: bounds its memory, and keeps small models' activations in the cache
_COMPANY = 16  # tokens that stand beside the rows: products over fewer rows take other kernels


def can_score(served: Served) -> bool:
    """Whether the trainer's pass applies: its architectures, in float32 (others keep what decoding gave)."""
    if served.dtype != torch.float32 or not forward.prepare(served.model):
        return False
    if served.device.type == "cpu":
        attention.use_for(served.model)  # `prepare` set the trainer's, which this one hands such passes on to
    return True


def score(served: Served, rows: Sequence[Row]) -> None:
    """Replace the log-probs of each row's output, at its own temperature. All were sampled with the served weights."""
    for temperature in sorted({row.job.request.params.scale for row in rows}):
        alike = [row for row in rows if row.job.request.params.scale == temperature]
        for bin_ in pack_best_fit([len(row.ids) for row in alike], PASS_TOKENS_MAX):
            _score([alike[index] for index in bin_], served, temperature)


def _score(rows: Sequence[Row], served: Served, temperature: float) -> None:
    company = [0] * _COMPANY
    sequences = [*(row.ids for row in rows), company]
    lengths = torch.tensor([len(ids) for ids in sequences])
    first = torch.tensor([*(len(row.job.request.input_ids) for row in rows), 1])
    width = int(lengths.max())
    columns = torch.arange(width)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
    seen = columns < lengths[:, None]
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": seen,
        "loss_mask": seen & (columns >= first[:, None]),
        "temperature": temperature,
    }
    device = served.device
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    found = forward.token_log_probs(served.model, moved, with_entropy=False, share_prompts=True)
    values = found.log_probs_N.tolist()
    for row, count in zip(rows, found.keep.sum(1).tolist(), strict=False):  # the company comes last
        row.logprobs, values = values[:count], values[count:]
