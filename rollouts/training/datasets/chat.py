"""Chat templates to token ids and a mask of the trained ones. Pure, apart from the tokenizer.

Trained: the assistant's text and the special token that ends its turn. Not trained: everything before and between.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat_template import (
    ChatTemplate,
    Conversation,
    Message,
    Piece,
    clean_messages,
    split_conversation,
)
from rollouts.training.datasets.lost_text import refuse_lost_context
from rollouts.training.datasets.plain import NotPlain, to_plain
from rollouts.training.datasets.turn_end import TurnEnds
from rollouts.training.seams import Tokenizer

__all__ = [
    "Conversation",
    "Rendering",
    "render_conversation",
    "render_conversations",
    "render_prompt",
    "render_prompts",
]


@dataclass(frozen=True)
class Rendering:
    """A conversation, or its beginning, as tokens; `mask` is 1.0 on what is trained of the messages `turns`."""

    token_ids: list[int]
    mask: list[float]
    turns: tuple[int, ...]


def render_prompt(tokenizer: Tokenizer, prompt: str | dict[str, Any]) -> list[int]:
    """Return the token ids of a prompt up to where the assistant begins. A bare string is one user message.

    A row's "tools" are offered to the model. Raises DataError without a template, and where it refuses the
    messages or leaves out a part of them or of the tools.
    """
    return render_prompts(tokenizer, [(prompt, "prompt")])[0]


def render_prompts(
    tokenizer: Tokenizer, prompts: Sequence[tuple[str | dict[str, Any], str]]
) -> list[list[int]]:
    """Return `render_prompt` of each (prompt, where), all tokenized in one call; errors name the row by its `where`."""
    texts = [_prompt_text(tokenizer, prompt, where) for prompt, where in prompts]
    return [ids for ids, _ in _encode(tokenizer, texts)] if texts else []


def _prompt_text(tokenizer: Tokenizer, prompt: str | dict[str, Any], where: str) -> str:
    row = {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else prompt
    template = ChatTemplate(tokenizer, row.get("tools"), where)
    messages = clean_messages(row.get("messages"), where)
    (rendered,) = template.render([messages], add_generation_prompt=True)
    refuse_lost_context(template, messages, rendered.text, where, add_generation_prompt=True)
    refuse_half_characters(rendered.text, where)
    return rendered.text


def render_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], where: str, *, tools: Any = None
) -> list[Rendering]:
    """Render one conversation: see `render_conversations`."""
    return render_conversations(tokenizer, [Conversation(messages, where, tools)])[0]


def render_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> list[list[Rendering]]:
    """Return token ids and masks of each conversation; all are tokenized in one call, each text once.

    The last rendering of a conversation is `tokenizer.apply_chat_template` of all of it. Earlier ones come only where
    the template would render earlier turns differently than they were spoken (it strips their thinking, say): they are
    beginnings of the conversation, and every assistant turn is trained in one rendering alone. Spans come from the
    template's {% generation %} markers, else from the difference that each assistant message makes.

    An example without any assistant turn gets an all-zero mask. Raises DataError naming `where` for a conversation that
    cannot be masked: see `split_conversation`; a turn without a special token at its end; a token across a turn's
    beginning.
    """
    if not conversations:
        return []  # the tokenizer refuses an empty list
    pieces = [split_conversation(tokenizer, conversation) for conversation in conversations]
    for conversation, own in zip(conversations, pieces, strict=True):
        for piece in own:
            refuse_half_characters(piece.text, conversation.where)
    encoded = iter(_encode(tokenizer, [piece.text for own in pieces for piece in own]))
    ends = TurnEnds.from_tokenizer(tokenizer)
    return [
        [
            _Masker(tokenizer, ends, conversation.where, piece, *next(encoded)).rendering()
            for piece in own
        ]
        for conversation, own in zip(conversations, pieces, strict=True)
    ]


def refuse_half_characters(text: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which no tokenizer takes. Rows are checked as they load."""
    try:
        to_plain(text)
    except NotPlain as error:
        raise DataError(f"{where}: {error}") from None


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[list[int], list[int] | None]]:
    """Return exactly the ids that `apply_chat_template(tokenize=True)` makes of these texts, and where each token ends.

    An end is the character after the token's last; None where the tokenizer does not give it.
    """
    fast = tokenizer.is_fast
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    if not fast:
        return [(ids, None) for ids in encoded["input_ids"]]
    ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
    return list(zip(encoded["input_ids"], ends, strict=True))


@dataclass(frozen=True)
class _Masker:
    """Finds the tokens of a piece's spans."""

    tokenizer: Tokenizer
    turn_ends: TurnEnds
    where: str
    piece: Piece
    token_ids: list[int]
    ends: list[int] | None

    def rendering(self) -> Rendering:
        mask = [0.0] * len(self.token_ids)
        for turn in self.piece.turns:
            for start, stop in turn.spans:
                first, last = self._first_token(start), self._count_tokens(stop)
                if (start, stop) == turn.spans[-1]:
                    last = self._end_of_turn(first, last)
                mask[first:last] = [1.0] * (last - first)
        return Rendering(self.token_ids, mask, tuple(turn.message for turn in self.piece.turns))

    def _first_token(self, start: int) -> int:
        """Return the first token of the text that begins at character `start`.

        A token may lie across it, where an answer opens with a line break, say, which merges with the header's. It then
        belongs to the prompt, if only white space is lost to it.
        """
        count, text = self._count_tokens(start), self.piece.text
        if self.ends is not None and (start == 0 or (count and self.ends[count - 1] == start)):
            return count
        # Some tokenizers leave white space out of their offsets, so only tokens show what a gap belongs to.
        if _encode(self.tokenizer, [text[:start]])[0][0] == self.token_ids[:count]:
            return count
        inside = text[start:] if self.ends is None else text[start : self.ends[count]]
        if inside.strip():
            raise DataError(
                f"{self.where}: the tokenizer makes one token of the end of the assistant's header and {inside[:20]!r},"
                " its first word, so it can be neither trained nor left out. Fix: a chat template whose header ends "
                "with a special token or a line break."
            )
        return count + 1

    def _count_tokens(self, stop: int) -> int:
        """Return how many tokens end by character `stop`."""
        if self.ends is None:
            return len(_encode(self.tokenizer, [self.piece.text[:stop]])[0][0])
        return bisect_right(self.ends, stop)

    def _end_of_turn(self, start: int, stop: int) -> int:
        """Return where training of tokens [start, stop) ends: after the token that ends the turn.

        A template may write white space after that token, which is never sampled, or close its markers before it.
        """
        ids = self.token_ids
        end = self.turn_ends.after_turn(ids, start, stop)
        if end is not None:
            return end
        if self.piece.marked and stop < len(ids) and ids[stop] in self.turn_ends.specials:
            return stop + 1
        raise DataError(
            f"{self.where}: the chat template ends an assistant turn without a special token, so stopping could not be "
            "trained; needs an end-of-turn token such as the tokenizer's eos_token"
        )
