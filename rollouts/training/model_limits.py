"""How many token ids and positions a model has room for, so that rows beyond them are found before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollouts.data_formats.row import DataError
from rollouts.training.types import Sample

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelLimits:
    embedding_rows: int | None  # token ids are below it; None: not known
    positions: int | None  # of a learned table; None without one: rotary positions have no end

    def require(self, largest_id: int, length: int, what: str) -> None:
        """Raise DataError, with the numbers, where `what` has a token id or a length beyond the model's."""
        if self.embedding_rows is not None and largest_id >= self.embedding_rows:
            raise DataError(
                f"{what} has the token id {largest_id}, and the model's embedding has {self.embedding_rows} rows "
                f"(ids 0 to {self.embedding_rows - 1}). Fix: the tokenizer that belongs to the model, or a model whose "
                "embeddings were resized for the tokens that were added"
            )
        if self.positions is not None and length > self.positions:
            raise DataError(
                f"{what} has {length} tokens, and the model has {self.positions} learned positions. Fix: max_length of "
                f"at most {self.positions} (data.max_length in a config), which leaves longer rows out"
            )

    def left(self, wanted: int, used: int) -> int:
        """Return how many of `wanted` new tokens have a position behind `used` ones."""
        return wanted if self.positions is None else min(wanted, self.positions - used)


def limits_of(model: "nn.Module") -> ModelLimits:
    """Return the limits that a model's own tables set."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    rows = None if weight is None else int(weight.shape[0])
    return ModelLimits(rows, _learned_positions(model, embedding))


def require_fit(model: "nn.Module", samples: Sequence[Sample]) -> None:
    """Raise DataError, naming the row, for the sample that goes furthest beyond `model`'s limits."""
    limits = limits_of(model)
    if limits == ModelLimits(None, None) or not samples:
        return
    for measure in (_largest_id, _length):
        worst = max(samples, key=measure)
        where = worst.metadata.get("where") or f"the prompt {str(worst.prompt)[:80]!r}"
        limits.require(_largest_id(worst), _length(worst), str(where))


def _largest_id(sample: Sample) -> int:
    return max(sample.tokens, default=0)


def _length(sample: Sample) -> int:
    return len(sample.tokens)


def _learned_positions(model: "nn.Module", embedding: object) -> int | None:
    """Rows of the smallest table of learned positions: GPT-2's `wpe`, OPT's `embed_positions` (two rows are spare)."""
    from torch import nn

    tables = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not embedding
        and _is_position(name.rpartition(".")[2])
    ]
    return min(tables, default=None)


def _is_position(name: str) -> bool:
    return name == "wpe" or "position" in name
