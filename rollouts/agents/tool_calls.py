"""Tool calls in what a model wrote. Pure: text in, a message as chat templates take it out."""

import json
import re
from typing import Any

FORMATS = ("hermes", "json")

_HERMES = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def parse_message(text: str, tool_format: str) -> tuple[dict[str, Any], list[str]]:
    """The assistant's message in `text`, and what was wrong with each call that could not be read.

    "hermes": any number of `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Qwen, Hermes). "json": the text
    as a whole is one such object, "parameters" in place of "arguments" too (Llama 3). Without calls all is content.
    """
    if tool_format == "hermes":
        content, bodies = _HERMES.sub("", text).strip(), _HERMES.findall(text)
    elif tool_format == "json":
        is_call = text.lstrip().startswith('{"name"')
        content, bodies = ("", [text]) if is_call else (text, [])
    else:
        raise ValueError(f"tool_format={tool_format!r}: needs one of {', '.join(map(repr, FORMATS))}")
    read = [_read_call(body) for body in bodies]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    calls = [{"type": "function", "function": call} for call in read if isinstance(call, dict)]
    if calls:
        message["tool_calls"] = calls
    return message, [problem for problem in read if isinstance(problem, str)]


def _read_call(body: str) -> dict[str, Any] | str:
    """{"name", "arguments"}, or what is wrong."""
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        return f"error: the tool call is not JSON: {error.msg} at character {error.pos}"
    arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
    if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
        return 'error: a tool call needs {"name": text, "arguments": {...}}'
    return {"name": value["name"], "arguments": arguments}
