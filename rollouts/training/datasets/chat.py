"""Chat templates to token ids and a mask of what is trained. Pure but for the tokenizer it is given.

Trained: the assistant's text and the special token that ends its turn. Not trained: everything before and between.
"""

from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from rollouts.training.datasets.chat_template import (
    Conversation,
    Message,
    Piece,
    check_tools,
    clean_messages,
    render_texts,
    split_conversation,
)
from rollouts.training.datasets.rows import DataError

__all__ = ["Conversation", "Rendering", "render_conversation", "render_conversations", "render_prompt"]


@dataclass(frozen=True)
class Rendering:
    """A conversation, or its beginning, as tokens; `mask` is 1.0 on what is trained of the messages `turns`."""

    token_ids: list[int]
    mask: list[float]
    turns: tuple[int, ...]


@dataclass(frozen=True)
class _Encoded:
    """ends: the character after each token's last, None where the tokenizer does not tell."""

    text: str
    token_ids: list[int]
    ends: list[int] | None


def render_prompt(tokenizer: Any, prompt: str | dict[str, Any]) -> list[int]:
    """Token ids of a prompt up to where the assistant begins. A bare string is one user message.

    A row's "tools" are offered to the model. Raises DataError where there is no template or it refuses the messages.
    """
    row = {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else prompt
    tools = check_tools(row.get("tools"), "prompt")
    messages = clean_messages(row["messages"], "prompt")
    texts, _ = render_texts(tokenizer, [messages], tools, "prompt", add_generation_prompt=True)
    return _encode(tokenizer, texts)[0].token_ids


def render_conversation(
    tokenizer: Any, messages: Sequence[Message], where: str, *, tools: Any = None
) -> list[Rendering]:
    """One conversation: see `render_conversations`."""
    return render_conversations(tokenizer, [Conversation(messages, where, tools)])[0]


def render_conversations(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[Rendering]]:
    """Token ids and masks of each conversation; all are tokenized in one call, each text once.

    The last rendering of a conversation is `tokenizer.apply_chat_template` of all of it. Earlier ones come only where
    the template would render earlier turns differently than they were spoken (it strips their thinking, say): they are
    beginnings of the conversation, and every assistant turn is trained in one rendering alone. Spans come from the
    template's {% generation %} markers, else from the difference that each assistant message makes.

    An example without any assistant turn comes back with an all-zero mask. Raises DataError naming `where` for what
    cannot be masked: see `split_conversation`; a turn that no special token ends; a token across a turn's beginning.
    """
    pieces = [split_conversation(tokenizer, conversation) for conversation in conversations]
    encoded = iter(_encode(tokenizer, [piece.text for own in pieces for piece in own]))
    added = tokenizer.added_tokens_decoder  # "</tool_call>" is one too, but not special: no turn ends there
    specials = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    return [
        [_rendering(tokenizer, next(encoded), piece, specials, conversation.where) for piece in own]
        for conversation, own in zip(conversations, pieces, strict=True)
    ]


def _encode(tokenizer: Any, texts: list[str]) -> list[_Encoded]:
    """Exactly what `apply_chat_template(tokenize=True)` makes of these texts."""
    fast = tokenizer.is_fast
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    offsets = encoded["offset_mapping"] if fast else [None] * len(texts)
    return [
        _Encoded(text, ids, None if pairs is None else [end for _, end in pairs])
        for text, ids, pairs in zip(texts, encoded["input_ids"], offsets, strict=True)
    ]


def _rendering(tokenizer: Any, encoded: _Encoded, piece: Piece, specials: Set[int], where: str) -> Rendering:
    mask = [0.0] * len(encoded.token_ids)
    for turn in piece.turns:
        for start, stop in turn.spans:
            first = _first_token(tokenizer, encoded, start, where)
            last = _count_tokens(tokenizer, encoded, stop)
            if (start, stop) == turn.spans[-1]:
                last = _end_of_turn(tokenizer, encoded.token_ids, first, last, piece.marked, specials, where)
            mask[first:last] = [1.0] * (last - first)
    return Rendering(encoded.token_ids, mask, tuple(turn.message for turn in piece.turns))


def _first_token(tokenizer: Any, encoded: _Encoded, start: int, where: str) -> int:
    """The first token of what begins at character `start`.

    A token may stand across it, where an answer opens with a line break, say, which merges with the header's: then it
    belongs to the prompt, if no more than white space is lost to it.
    """
    count = _count_tokens(tokenizer, encoded, start)
    if encoded.ends is not None and (start == 0 or (count and encoded.ends[count - 1] == start)):
        return count
    # Some tokenizers leave white space out of their offsets, so what a gap belongs to shows only in tokens.
    if _encode(tokenizer, [encoded.text[:start]])[0].token_ids == encoded.token_ids[:count]:
        return count
    inside = encoded.text[start : encoded.ends[count]] if encoded.ends is not None else encoded.text[start:]
    if inside.strip():
        raise DataError(
            f"{where}: the tokenizer makes one token of the end of the assistant's header and {inside[:20]!r}, its "
            "first word, so it can be neither trained nor left out. Fix: a chat template whose header ends with a "
            "special token or a line break."
        )
    return count + 1


def _count_tokens(tokenizer: Any, encoded: _Encoded, stop: int) -> int:
    """How many tokens end by character `stop`."""
    if encoded.ends is None:
        return len(_encode(tokenizer, [encoded.text[:stop]])[0].token_ids)
    return bisect_right(encoded.ends, stop)


def _end_of_turn(
    tokenizer: Any, token_ids: list[int], start: int, stop: int, marked: bool, specials: Set[int], where: str
) -> int:
    """Where training of tokens [start, stop) ends: after the special token that ends the turn.

    A template may write white space after that token, which nobody samples, or close its markers before it.
    """
    end = next((end for end in range(stop, start, -1) if token_ids[end - 1] in specials), None)
    if end is not None and not tokenizer.decode(token_ids[end:stop]).strip():
        return end
    if marked and stop < len(token_ids) and token_ids[stop] in specials:
        return stop + 1
    raise DataError(
        f"{where}: the chat template ends an assistant turn without a special token, so stopping could not be trained; "
        "needs an end-of-turn token such as the tokenizer's eos_token"
    )
