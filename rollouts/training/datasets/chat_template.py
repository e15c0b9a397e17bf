"""Conversations to text through the tokenizer's chat template, and the assistant's characters in it. Pure.

A template may render the beginning of a conversation differently once more follows: it strips earlier thinking, say,
or moves the system message to the last user turn. A model that speaks sees the rendering up to its turn, so such a
conversation becomes several pieces. Each trains the turns whose rendering is still the one of when they were spoken.
"""

import contextlib
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.data_formats.message_keys import TRAIN_KEYS, untrained
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.lost_text import refuse_lost_context, refuse_lost_text
from rollouts.training.datasets.plain import NotPlain, parse_json
from rollouts.training.seams import Tokenizer

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]
Span = tuple[int, int]  # half-open


@dataclass(frozen=True)
class Conversation:
    """`tools`: JSON schemas of the functions the assistant may call; also a JSON text of them, as data sets hold it."""

    messages: Sequence[Message]
    where: str  # the row, for messages to the user
    tools: Any = None


@dataclass(frozen=True)
class Turn:
    """One assistant message in a text: which one it is, and its characters there, in order."""

    message: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Piece:
    """The text of a conversation, or of its beginning, and the turns that are trained in it."""

    text: str
    turns: tuple[Turn, ...]
    marked: (
        bool  # spans come from {% generation %} markers, which may end before the end-of-turn token
    )


def split_conversation(tokenizer: Tokenizer, conversation: Conversation) -> list[Piece]:
    """Return the pieces that train each assistant turn once, in order; one piece wherever the prefixes nest.

    Without an assistant turn it is one piece with no turns. Raises DataError naming the row where the template refuses
    the messages or leaves out some of their text, or where a turn's beginning cannot be found.
    """
    template = ChatTemplate(tokenizer, conversation.tools, conversation.where)
    messages = clean_messages(conversation.messages, conversation.where)
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    ends = [messages[: index + 1] for index in indices]
    if not indices or indices[-1] + 1 < len(messages):
        ends.append(messages)
    rendered = template.render(ends)
    whole = rendered[-1].text
    refuse_lost_context(template, messages, whole, conversation.where)
    spoken: list[tuple[str, Turn]] = []
    for index, after, before in zip(
        indices, rendered, template.prompts(messages, indices), strict=False
    ):
        if (
            untrained(conversation.messages[index], f"{conversation.where}: messages[{index}]")
            is not None
        ):
            continue
        where = f"{conversation.where}: messages[{index}]"
        spans = template.turn_spans(messages[:index], before, after, where)
        refuse_lost_text(messages[index], after.text[spans[0][0] :], where)
        spoken.append((after.text, Turn(index, spans)))
    return [Piece(text, turns, template.marked) for text, turns in _group(whole, spoken)]


@dataclass(frozen=True)
class Rendered:
    text: str
    marks: list[Span]  # what the template puts between {% generation %} and {% endgeneration %}


class ChatTemplate:
    """A tokenizer's template, with the tools of one row; errors name the row by `where`."""

    def __init__(self, tokenizer: Tokenizer, tools: Any, where: str) -> None:
        self.tools = _check_tools(tools, where)
        try:
            self._template = tokenizer.get_chat_template(tools=self.tools)
        except ValueError as error:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: {error}"
            ) from None
        self._special_tokens = tokenizer.special_tokens_map
        self._where = where
        # texts that it may write itself
        self.words = [self._template, *map(str, self._special_tokens.values())]
        self.marked = GENERATION_TAG.search(self._template) is not None

    def text_with(
        self, messages: Sequence[Message], tools: Any, *, add_generation_prompt: bool
    ) -> str | None:
        """Return the text of other messages and tools; None where the template refuses them."""
        other = copy.copy(self)
        other.tools = tools or None
        try:
            return other.render([messages], add_generation_prompt=add_generation_prompt)[0].text
        except DataError:
            return None

    def render(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
    ) -> list[Rendered]:
        """Return texts exactly as `tokenizer.apply_chat_template` makes them."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # it is annotated as str
                conversations=[list(messages) for messages in conversations],
                tools=list(self.tools) if self.tools else None,
                chat_template=self._template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError) as error:
            # a TypeError: the template adds a string to a missing value
            roles = [message["role"] for message in conversations[-1]]
            raise DataError(
                f"{self._where}: the chat template refuses these messages (roles {roles}): {error}"
            ) from None
        texts, marks = rendered
        return [
            Rendered(*pair)
            for pair in zip(texts, marks if self.marked else [[]] * len(texts), strict=True)
        ]

    def prompts(self, messages: Sequence[Message], indices: Sequence[int]) -> list[Rendered]:
        """Return what the model sees before each of the assistant messages, its header included."""
        beginnings = [messages[:index] for index in indices]
        # many templates cannot render an empty list; marks need no header
        if self.marked and indices and indices[0] == 0:
            return [
                Rendered("", []),
                *(self.render(beginnings[1:], add_generation_prompt=True) if indices[1:] else []),
            ]
        return self.render(beginnings, add_generation_prompt=True) if indices else []

    def turn_spans(
        self, beginning: Sequence[Message], before: Rendered, after: Rendered, where: str
    ) -> tuple[Span, ...]:
        """Return the characters of the turn at the end of `after`: the new marks, or else all after its header.

        Some markers include the header; they are cut to what follows it.
        """
        header_end = self._header_end(beginning, before.text, after.text)
        count = len(before.marks)
        if self.marked and after.marks[:count] == before.marks:
            marks = after.marks[count:]
        elif not self.marked and header_end is not None:
            marks = [(header_end, len(after.text))]
        else:
            raise DataError(
                f"{where}: the chat template renders the text before this turn differently once the turn follows, "
                "so the assistant's tokens cannot be told apart. Fix: a template whose generation prompt is the "
                "beginning of the assistant's turn."
            )
        first = header_end or 0
        spans = tuple((max(start, first), stop) for start, stop in marks if stop >= first)
        if not spans or spans[0][0] == len(after.text):
            raise DataError(
                f"{where}: the chat template renders nothing for this assistant message"
                + (" between {% generation %} and {% endgeneration %}" if self.marked else "")
                + ", so no part of it could be trained"
            )
        return spans

    def _header_end(self, beginning: Sequence[Message], before: str, after: str) -> int | None:
        """Return where `after` departs from the generation prompt at the end of `before`; None if even earlier.

        It may depart within it: some prompts open a thought, which an answer without one does not continue.
        """
        if after.startswith(before):
            return len(before)
        plain = self.render([beginning])[0].text
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after)
        )
        return shared if after.startswith(plain) and shared >= len(plain) else None


def _group(whole: str, spoken: Sequence[tuple[str, Turn]]) -> list[tuple[str, tuple[Turn, ...]]]:
    """Assign each turn to the longest text that begins as the turn's text does."""
    groups: list[tuple[str, list[Turn]]] = [(whole, [])]
    for text, turn in reversed(spoken):
        if not groups[-1][0].startswith(text):
            groups.append((text, []))
        groups[-1][1].append(turn)
    kept = [(text, tuple(reversed(turns))) for text, turns in reversed(groups) if turns]
    return kept or [(whole, ())]


def clean_messages(messages: object, where: str) -> list[Message]:
    """Return messages as templates need them: without null keys, arguments of calls as objects, not text.

    Nulls within calls stay: Arrow's padding was removed when rows were read. Keys that say what is trained
    (`message_keys`) are removed. Raises DataError for a tool call without a name, or with arguments other than an
    object.
    """
    if not isinstance(messages, list | tuple) or not all(
        isinstance(message, dict) and "role" in message for message in messages
    ):
        raise DataError(
            f"{where}: messages={str(messages)[:120]!r}; needs a list of objects with 'role' and 'content'"
        )
    return [
        _clean(message, f"{where}: messages[{index}]") for index, message in enumerate(messages)
    ]


def _check_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Return a row's tools as a list of schemas, or None. Raises DataError for other values than that or its JSON."""
    parsed = _parse(tools)
    if parsed is None or parsed == []:
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise DataError(
            f"{where}: tools={str(tools)[:120]!r}; needs a list of JSON schemas, or the JSON text of one"
        )
    return [_without_null_properties(tool) for tool in parsed]


def _clean(message: Message, where: str) -> Message:
    untrained(message, where)  # raises for an unknown value
    clean = {
        key: value
        for key, value in message.items()
        if value is not None and key.lower() not in TRAIN_KEYS
    }
    if clean.get("tool_calls"):
        clean["tool_calls"] = [_clean_call(call, where) for call in clean["tool_calls"]]
    return clean


def _clean_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where}.tool_calls has {call!r}; needs {{'function': {{'name': ..., 'arguments': ...}}}}"
        )
    # JSON text is OpenAI's form; templates would encode it again
    arguments = _parse(function.get("arguments"))
    if not isinstance(arguments, dict | None):
        shown = str(arguments) if len(str(arguments)) <= 120 else str(arguments)[:117] + "..."
        raise DataError(
            f"{where}.tool_calls: arguments={shown!r}; needs an object, or the JSON text of one"
        )
    clean = {**function, "arguments": arguments or {}}
    return {**call, "function": clean} if "function" in call else clean


def _parse(value: Any) -> Any:
    """Return the value of a JSON text; other values, and text that `parse_json` refuses, as they are."""
    if isinstance(value, str):
        with contextlib.suppress(NotPlain):
            return parse_json(value)
    return value


def _without_null_properties(schema: Any) -> Any:
    """Return a schema without properties whose definition is null: Arrow's padding, kept in a file.

    Every other null stays: "default": null has a meaning.
    """
    if isinstance(schema, list):
        return [_without_null_properties(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    clean = {key: _without_null_properties(value) for key, value in schema.items()}
    if isinstance(clean.get("properties"), dict):
        clean["properties"] = {
            key: value for key, value in clean["properties"].items() if value is not None
        }
    return clean
