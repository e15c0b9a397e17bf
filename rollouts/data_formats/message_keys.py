"""Keys of a message that say whether it is trained: `weight` (OpenAI, Mistral), `train`, `loss` and the like. Pure."""

from collections.abc import Mapping
from typing import Any

from rollouts.data_formats.row import DataError

TRAIN_KEYS = (
    "weight",
    "train",
    "training",
    "trainable",
    "loss",
    "do_train",
    "train_on",
    "is_trainable",
    "learn",
)  # 0, 1
_REFUSED = (  # would change the loss
    *(
        "loss_weight",
        "loss_mask",
        "mask",
        "masked",
        "is_masked",
        "train_detail",
        "training_detail",
        "train_on_turn",
    ),
    *("ignore", "ignored", "ignore_loss", "no_loss", "skip", "skip_loss", "exclude", "excluded"),
)
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
WEIGHT_0 = "marked as not to be trained"
EMPTY = "empty"


def untrained(message: Mapping[str, Any], where: str) -> str | None:
    """Return why an assistant's message is not trained: WEIGHT_0 or EMPTY; None for one that is.

    Raises DataError, naming `where`, for keys and values that would change the loss in a way that is not supported,
    and for a message of another role that is marked as trained.
    """
    named = {
        key.lower(): value
        for key, value in message.items()
        if isinstance(key, str) and value is not None
    }
    said = {key: named[key] for key in TRAIN_KEYS if key in named}
    values = {_switch(key, value, where) for key, value in said.items()}
    if len(values) > 1:
        raise DataError(f"{where} has {said}, which contradict each other; needs one of them")
    for key in _REFUSED:
        if key in named:
            raise DataError(
                f"{where}.{key}={named[key]!r} would change the loss, and is not supported. Fix: "
                "'weight': 0 or 1 on an assistant's message, or leave the key out"
            )
    if message.get("role") != "assistant":
        # OpenAI's weight is about the assistant's messages alone
        if True in values and set(said) != {"weight"}:
            raise DataError(
                f"{where} has {said}, and its role is {message.get('role')!r}; only the assistant's turns are trained. "
                "Fix: leave the key out"
            )
        return None
    if False in values:
        return WEIGHT_0
    return EMPTY if _is_empty(message) else None


def _switch(key: str, value: Any, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(
        f"{where}.{key}={value!r}; needs 0 or 1 (or false, true): a turn is trained or it is not"
    )


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Return whether a message lacks text, thoughts and calls: only the end of the turn could be trained."""
    said = [message.get(key) for key in ("content", *THINKING_KEYS)]
    return not message.get("tool_calls") and not any(
        text for text in said if not isinstance(text, str) or text.strip()
    )
