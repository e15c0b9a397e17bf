"""Tool calls in a model's text. Pure: text in, a message as chat templates take it out."""

import json
import re
from typing import Any

FORMATS = ("hermes", "json")

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_WHOLE_CALL = re.compile(
    r'\s*(?:<\|python_tag\|>)?\s*(\{\s*"(?:name|type|parameters|arguments|function)"\s*:.*)',
    re.DOTALL,
)


def parse_message(text: str, tool_format: str) -> tuple[dict[str, Any], list[str]]:
    """Return the assistant's message in `text`, and the mistake of each call that could not be read.

    "hermes": any number of `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Qwen, Hermes). "json": the text
    as a whole is one such object, "parameters" in place of "arguments" too (Llama 3). Without calls all is content.
    A call ends where its JSON does, whatever its strings hold. A tag that is only mentioned is content. A call at the
    text's end counts without its closing tag.
    """
    if tool_format == "hermes":
        content, bodies = _hermes(text)
    elif tool_format == "json":
        whole = _WHOLE_CALL.fullmatch(text)
        content, bodies = ("", [whole[1]]) if whole else (text, [])
    else:
        raise ValueError(
            f"tool_format={tool_format!r}: needs one of {', '.join(map(repr, FORMATS))}"
        )
    read = [_read_call(body) for body in bodies]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    calls = [{"type": "function", "function": call} for call in read if isinstance(call, dict)]
    if calls:
        message["tool_calls"] = calls
    return message, [problem for problem in read if isinstance(problem, str)]


def _hermes(text: str) -> tuple[str, list[str]]:
    """Return the text outside of the tagged calls, and the text of each call."""
    outside, bodies, place = list[str](), list[str](), 0
    while (opened := text.find(_OPEN, place)) >= 0:
        begin = opened + len(_OPEN)
        end = _end_of_json(text, begin)
        closed, again = (text.find(tag, begin if end is None else end) for tag in (_CLOSE, _OPEN))
        unclosed = closed < 0 or 0 <= again < closed
        if unclosed and end is None and (again >= 0 or not text[begin:].lstrip().startswith("{")):
            outside.append(text[place:begin])  # the tag is only mentioned
            place = begin
            continue
        stop = (len(text) if end is None else end) if unclosed else closed
        outside.append(text[place:opened])
        bodies.append(text[begin:stop])
        place = stop if unclosed else closed + len(_CLOSE)
    return "".join([*outside, text[place:]]).strip(), bodies


def _end_of_json(text: str, begin: int) -> int | None:
    """Return where the JSON value that begins at `begin` ends; None where none can be read."""
    start = begin + len(text[begin:]) - len(text[begin:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (json.JSONDecodeError, RecursionError):
        return None


def _read_call(body: str) -> dict[str, Any] | str:
    """Return {"name", "arguments"}, or the mistake."""
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        return f"error: the tool call is not JSON: {error.msg} at character {error.pos}"
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        return f"error: the tool call cannot be read: {error}"
    arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
    if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
        return 'error: a tool call needs {"name": text, "arguments": {...}}'
    return {"name": value["name"], "arguments": arguments}
