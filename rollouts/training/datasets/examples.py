"""An example: a row as a conversation (or a text) to train on, and as a prompt to answer. Pure."""

from dataclasses import dataclass
from typing import Any

from rollouts.training.datasets.rows import DataError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A row as a conversation and as a prompt; SFT takes the one, RL and evaluation the other."""

    where: str
    messages: list[Message]  # the whole conversation; [] for plain text
    prompt: dict[str, Any]  # "messages" up to where the answer begins, "answer" where known, "format", other columns
    text: str | None = None  # plain text, trained on whole and without a chat template


def check_message(message: Any, where: str) -> Message:
    """A message without keys that Arrow filled with null. An assistant that calls tools may leave its content out."""
    if not isinstance(message, dict):
        raise DataError(f"{where}={message!r}; needs an object with 'role' and 'content'")
    clean = {key: value for key, value in message.items() if value is not None}
    if clean.get("role") not in ROLES:
        raise DataError(f"{where}.role={clean.get('role')!r}; needs one of {', '.join(ROLES)}")
    if clean["role"] == "assistant" and clean.get("tool_calls"):
        clean.setdefault("content", "")
    if not isinstance(clean.get("content"), str):
        raise DataError(f"{where}.content={clean.get('content')!r}; needs a string")
    return clean


def check_turns(messages: Any, where: str) -> list[Message]:
    """Messages that begin with the user and strictly alternate with the assistant: at least one turn of each."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: messages={messages!r}; needs at least two, a user's and an assistant's")
    clean = [check_message(message, f"{where}: messages[{index}]") for index, message in enumerate(messages)]
    for index, message in enumerate(clean):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise DataError(
                f"{where}: messages[{index}].role={message['role']!r}; needs {expected!r}: user and assistant alternate"
            )
    return clean


def conversation_example(
    where: str, messages: list[Message], others: dict[str, Any], *, format: str, answer: str | None = None
) -> Example:
    """An example of whole conversations: the prompt is what stands before a final assistant turn, its answer that turn.

    `answer`, or a column of that name, goes before the turn's own text.
    """
    ends_with_answer = messages[-1]["role"] == "assistant"
    if len(messages) == 1 and ends_with_answer:
        raise DataError(f"{where}: the only message is the assistant's; needs one to answer before it")
    prompt: dict[str, Any] = {"format": format, **others}
    if answer is not None:
        prompt["answer"] = answer
    elif ends_with_answer:
        prompt.setdefault("answer", messages[-1]["content"])
    prompt["messages"] = messages[:-1] if ends_with_answer else messages
    return Example(where, messages, prompt)
