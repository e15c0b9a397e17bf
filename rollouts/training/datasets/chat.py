"""Chat templates to token ids and a mask of what is trained. Pure but for the tokenizer it is given.

Trained: the assistant's text and the special token that ends its turn. Not trained: everything before and between.
"""

import itertools
import re
from typing import Any

from rollouts.training.datasets.rows import DataError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


def render_prompt(tokenizer: Any, prompt: str | dict[str, Any]) -> list[int]:
    """Token ids of a prompt up to where the assistant begins. A bare string is one user message.

    Raises DataError where there is no template or the template refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt["messages"]
    return _apply(tokenizer, messages, "prompt", add_generation_prompt=True)["input_ids"]


def render_conversation(tokenizer: Any, messages: list[Message], where: str) -> tuple[list[int], list[float]]:
    """Token ids of a whole conversation and, per token, 1.0 where the assistant speaks.

    Spans come from the template's {% generation %} markers, else from rendering each prefix: a template whose
    prefixes do not nest (one that strips earlier thinking, say) raises DataError naming `where`, as does an assistant
    turn that no special token ends. An example without any assistant turn comes back with an all-zero mask.
    """
    template = _template(tokenizer)
    marked = tokenizer.is_fast and GENERATION_TAG.search(template) is not None
    if marked:
        encoded = _apply(tokenizer, messages, where, return_assistant_tokens_mask=True)
        token_ids = encoded["input_ids"]
        spans = _runs(encoded["assistant_masks"])
    else:
        token_ids, spans = _spans_by_prefix(tokenizer, messages, where)
    mask = [0.0] * len(token_ids)
    for start, stop in spans:
        end = _end_of_turn(tokenizer, token_ids, (start, stop), marked, where)
        mask[start:end] = [1.0] * (end - start)
    return token_ids, mask


def _template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: {error}") from None


def _apply(tokenizer: Any, messages: list[Message], where: str, **options: Any) -> dict[str, list[int]]:
    from jinja2 import TemplateError

    _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise DataError(f"{where}: the chat template refuses these messages (roles {roles}): {error}") from None


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """Half-open spans of consecutive ones."""
    spans, position = [], 0
    for value, group in itertools.groupby(mask):
        length = len(list(group))
        if value:
            spans.append((position, position + length))
        position += length
    return spans


def _spans_by_prefix(tokenizer: Any, messages: list[Message], where: str) -> tuple[list[int], list[tuple[int, int]]]:
    """What rendering one message more adds, at each assistant message, is that message."""
    token_ids = _apply(tokenizer, messages, where)["input_ids"]
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:index], where, add_generation_prompt=True)["input_ids"] if index else []
        after = _apply(tokenizer, messages[: index + 1], where)["input_ids"]
        if token_ids[: len(before)] != before or token_ids[: len(after)] != after or len(after) <= len(before):
            raise DataError(
                f"{where}: messages[{index}]: the chat template renders the beginning of this conversation differently "
                "once more follows, so the assistant's tokens cannot be told apart. Fix: a template with "
                "{% generation %} markers, or one assistant turn per row."
            )
        spans.append((len(before), len(after)))
    return token_ids, spans


def _end_of_turn(tokenizer: Any, token_ids: list[int], span: tuple[int, int], marked: bool, where: str) -> int:
    """Where training of the span ends: after the special token that ends the turn.

    A template may write white space after that token, which nobody samples, or close its markers before it.
    """
    start, stop = span
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((end for end in range(stop, start, -1) if token_ids[end - 1] in specials), None)
    if end is not None and not tokenizer.decode(token_ids[end:stop]).strip():
        return end
    if marked and stop < len(token_ids) and token_ids[stop] in specials:
        return stop + 1
    raise DataError(
        f"{where}: the chat template ends an assistant turn without a special token, so stopping could not be trained; "
        "needs an end-of-turn token such as the tokenizer's eos_token"
    )
