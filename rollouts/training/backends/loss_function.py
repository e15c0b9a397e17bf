"""Calls a loss function: with `logits`, and by keyword with every key of a batch that its signature names."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Unpack, get_args, get_origin

from torch import Tensor

from rollouts.training.rl_losses import is_log_prob_loss
from rollouts.training.seams import Batch
from rollouts.training.token_selection import Logits

MODEL_KEYS = ("input_ids", "labels", "loss_mask")


class LossFunction:
    def __init__(self, function: Callable[..., Tensor]) -> None:
        parameters = inspect.signature(function).parameters.values()
        self.function = function
        self.reads_log_probs = is_log_prob_loss(function)
        self.required = frozenset(
            p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        )
        self._keys = _keys(parameters)

    def __call__(self, logits: Logits, inputs: Batch) -> Tensor:
        """Return the loss, a scalar; `inputs` are a batch on the device, with what a user has added to it."""
        named = {
            key: value for key, value in inputs.items() if self._keys is None or key in self._keys
        }
        return self.function(logits=logits, **named)

    def check(self, batch: Mapping[str, object], required: Iterable[str]) -> None:
        """Raise ValueError unless `batch` has what the model needs, and all of `required`."""
        missing = sorted({*MODEL_KEYS, *required} - {*batch, "logits"})
        if missing:
            name = getattr(self.function, "__name__", repr(self.function))
            raise ValueError(
                f"batch has no {', '.join(missing)}: needed by the model and {name}; it has {sorted(batch)}"
            )


def _keys(parameters: Iterable[inspect.Parameter]) -> frozenset[str] | None:
    """Return the keywords that a signature names, those of its `**x: Unpack[SomeTypedDict]` too; None: it takes any."""
    keys: set[str] = set()
    for parameter in parameters:
        if parameter.kind is not parameter.VAR_KEYWORD:
            keys.add(parameter.name)
        elif get_origin(parameter.annotation) is Unpack:
            keys |= set(get_args(parameter.annotation)[0].__annotations__)
        else:
            return None
    return frozenset(keys)
