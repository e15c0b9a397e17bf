"""An example: a row as a conversation (or a text) to train on, and as a prompt to answer. Pure."""

import math
from dataclasses import dataclass
from typing import Any

from rollouts.data_formats.message_keys import untrained
from rollouts.data_formats.row import DataError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A row as a conversation and as a prompt; SFT takes the one, RL and evaluation the other."""

    where: str
    messages: list[Message]  # the whole conversation; [] for plain text
    # "messages" up to where the answer begins, "answer" where known, "format", other columns
    prompt: dict[str, Any]
    text: str | None = None  # plain text, trained on whole and without a chat template
    replaced: tuple[str, ...] = ()  # columns of the row that are replaced by a key of the prompt


def check_message(message: Any, where: str) -> Message:
    """Return a message without null keys, which Arrow adds. An assistant that calls tools may leave its content out."""
    if not isinstance(message, dict):
        raise DataError(f"{where}={message!r}; needs an object with 'role' and 'content'")
    clean = {key: value for key, value in message.items() if value is not None}
    if clean.get("role") not in ROLES:
        raise DataError(f"{where}.role={clean.get('role')!r}; needs one of {', '.join(ROLES)}")
    if clean["role"] == "assistant" and clean.get("tool_calls"):
        clean.setdefault("content", "")
    if not isinstance(clean.get("content"), str):
        raise DataError(f"{where}.content={clean.get('content')!r}; needs a string")
    untrained(clean, where)
    return clean


def check_turns(messages: Any, where: str) -> list[Message]:
    """Return messages that begin with the user and strictly alternate: at least one turn of user and assistant."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{where}: messages={messages!r}; needs at least two, a user's and an assistant's"
        )
    clean = [
        check_message(message, f"{where}: messages[{index}]")
        for index, message in enumerate(messages)
    ]
    for index, message in enumerate(clean):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise DataError(
                f"{where}: messages[{index}].role={message['role']!r}; needs {expected!r}: user and assistant alternate"
            )
    return clean


def conversation_example(
    where: str,
    messages: list[Message],
    others: dict[str, Any],
    *,
    format: str,
    answer: str | None = None,
) -> Example:
    """Return an example of a whole conversation: a final assistant turn is the answer, all before it the prompt.

    `answer`, or a column of that name, replaces the turn's text as the answer.
    """
    ends_with_answer = messages[-1]["role"] == "assistant"
    if len(messages) == 1 and ends_with_answer:
        raise DataError(
            f"{where}: the only message is the assistant's; needs one to answer before it"
        )
    own: dict[str, Any] = {
        "format": format,
        "messages": messages[:-1] if ends_with_answer else messages,
    }
    if answer is not None:
        own["answer"] = answer
    elif "answer" in others:
        check_answer(others["answer"], where)
    elif ends_with_answer and messages[-1]["content"].strip():
        # an empty turn is not an answer to compare with
        own["answer"] = messages[-1]["content"]
    return example(where, messages, others, own)


def example(
    where: str,
    messages: list[Message],
    others: dict[str, Any],
    own: dict[str, Any],
    *,
    text: str | None = None,
) -> Example:
    """Return an example whose prompt is the row's `others` columns and `own` keys, which win over such columns."""
    replaced = tuple(sorted(key for key in others if key in own and others[key] != own[key]))
    return Example(where, messages, {**others, **own}, text, replaced)


def check_answer(value: Any, where: str) -> None:
    """Raise DataError for an `answer` that no reward can compare with a response: needs text, a number, or several."""
    accepted = value if isinstance(value, list) else [value]
    # "" says: none
    right = isinstance(value, str) or (bool(accepted) and all(_is_answer(one) for one in accepted))
    if not right:
        raise DataError(
            f"{where}: answer={str(value)[:120]!r} ({type(value).__name__}); needs a string, a number, or a list of "
            "such, each of them right. Fix: put anything else into a column of another name"
        )


def _is_answer(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
