"""Find parts of a row that a chat template silently leaves out: a system message, tools, a thought, a call. Pure."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rollouts.data_formats.message_keys import THINKING_KEYS
from rollouts.data_formats.row import DataError

THINK_TAG = re.compile(r"</?think>")
Message = dict[str, Any]
# in place of a text and a tool's name; in no template and no row
_MARK, _TOOL_MARK = "Zq{}xj", "zt{}xj_tool"


class LostTool(DataError):
    """A chat template that does not offer the tools to the model."""


class Renderer(Protocol):
    """A `ChatTemplate`."""

    tools: list[dict[str, Any]] | None
    words: list[str]  # texts that the template may write itself

    def text_with(
        self, messages: Sequence[Message], tools: Any, *, add_generation_prompt: bool
    ) -> str | None:
        """Return the text of other messages and tools; None where the template refuses them."""


def refuse_lost_context(
    template: Renderer,
    messages: Sequence[Message],
    text: str,
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> None:
    """Raise DataError where the template silently drops a message that is not the assistant's, or a tool.

    `text` is its rendering of them. A text may also occur there for another reason: another message or the template has
    the same text. It is then rendered again with a unique mark in its place.
    """
    contents = {
        index: _content(message)
        for index, message in enumerate(messages)
        if message["role"] != "assistant"
    }
    names = {index: _tool_name(tool) for index, tool in enumerate(template.tools or ())}
    for index, content in contents.items():
        if not _appears(content, text):
            raise DataError(_lost_content(messages, index, where))
    for name in names.values():
        if not _appears(name, text):
            raise LostTool(_lost_tool(name, where))
    tools = list(template.tools or ())
    said = [*template.words, *(message["role"] for message in messages)]
    unsure = [
        index
        for index, content in contents.items()
        if _stands_in(
            content, [*said, *_strings([*messages[:index], *messages[index + 1 :], tools])]
        )
    ]
    unsure_tools = [
        index
        for index, name in names.items()
        if _stands_in(name, [*said, *_strings([*messages, *tools[:index], *tools[index + 1 :]])])
    ]
    if not unsure and not unsure_tools:
        return
    marked = template.text_with(
        [
            {**one, "content": _MARK.format(at)} if at in unsure else one
            for at, one in enumerate(messages)
        ],
        [
            _renamed(tool, _TOOL_MARK.format(at)) if at in unsure_tools else tool
            for at, tool in enumerate(tools)
        ],
        add_generation_prompt=add_generation_prompt,
    )
    if marked is None:  # it reads this content: a mark cannot replace it
        return
    for index in unsure:
        if _MARK.format(index) not in marked:
            raise DataError(_lost_content(messages, index, where))
    for index in unsure_tools:
        if _TOOL_MARK.format(index) not in marked:
            raise LostTool(_lost_tool(names[index], where))


def refuse_lost_text(message: Message, text: str, where: str) -> None:
    """Raise DataError where the template drops part of the assistant's message, when it is the last one."""
    thinking = next((key for key in THINKING_KEYS if message.get(key)), None)
    for key in ("content", thinking):
        parts = THINK_TAG.split(message[key]) if key and isinstance(message.get(key), str) else []
        if not all(_appears(part, text) for part in parts):
            raise DataError(_lost(where, str(key), message))
    for call in message.get("tool_calls", ()):
        if not _appears(call.get("function", call)["name"], text):
            raise DataError(_lost(where, "tool_calls", message))


def _content(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _tool_name(tool: dict[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name.strip() if isinstance(name, str) else ""


def _renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    function = tool.get("function")
    return (
        {**tool, "function": {**function, "name": name}}
        if isinstance(function, dict)
        else {**tool, "name": name}
    )


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _appears(content: str, text: str) -> bool:
    """Return whether `text` has `content`, up to white space around it, as it is or as JSON. True for empty content."""
    bare = content.strip()
    return bare in text or json.dumps(bare, ensure_ascii=False)[1:-1] in text


def _stands_in(content: str, texts: Sequence[str]) -> bool:
    return bool(content) and any(content in text for text in texts)


def _lost_content(messages: Sequence[Message], index: int, where: str) -> str:
    message = messages[index]
    return _lost(f"{where}: messages[{index}]", f"content of the {message['role']}", message)


def _lost_tool(name: str, where: str) -> str:
    return f"{where}: the chat template leaves out the tool {name!r}: it does not support tools"


def _lost(where: str, what: str, message: Message) -> str:
    return (
        f"{where}: the chat template leaves out {what}: {str(message)[:160]}. "
        "Fix: a template that renders it, or rows without it."
    )
