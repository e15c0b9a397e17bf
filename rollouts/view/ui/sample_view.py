"""One sample as a reader sees it: a conversation in parts, and its response's tokens with their numbers. Pure."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from rollouts.view.json_numbers import is_number
from rollouts.view.run_data import prompt_text

TEXT_MAX = 200_000  # characters of one part of a conversation
TOKENS_MAX = 6000  # of a response that are drawn one by one
DECIMALS = 4
Part = dict[str, str]  # {"role", "kind": "text" | "thinking" | "tool call" | "tool result", "text"}

_MARKED = re.compile(
    r"<think(?:ing)?>(?P<thinking>.*?)(?:</think(?:ing)?>|\Z)"
    r"|<tool_call>(?P<call>.*?)(?:</tool_call>|\Z)"
    r"|<tool_response>(?P<result>.*?)(?:</tool_response>|\Z)",
    re.DOTALL,
)
_KINDS = {"thinking": "thinking", "call": "tool call", "result": "tool result"}


def conversation(row: Mapping[str, Any]) -> list[Part]:
    """Return a sample's turns in parts: an agent's whole episode, else its prompt and the response."""
    metadata = row.get("metadata")
    messages = metadata.get("messages") if isinstance(metadata, Mapping) else None
    if _are_messages(messages):
        return [part for message in messages for part in _message(message)]
    return [*_prompt(row.get("prompt")), *_marked("assistant", str(row.get("response", "")))]


def _are_messages(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _prompt(prompt: Any) -> Iterator[Part]:
    messages = (
        prompt.get("messages") or prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    )
    if _are_messages(messages):
        for message in messages:
            yield from _message(message)
    else:
        yield from _part("user", "text", prompt_text(prompt))


def _message(message: Mapping[str, Any]) -> Iterator[Part]:
    role = str(message.get("role", "?"))
    if isinstance(thought := message.get("reasoning_content"), str):
        yield from _part(role, "thinking", thought)
    content = message.get("content")
    text = (
        content
        if isinstance(content, str)
        else ""
        if content is None
        else prompt_text([message]).removeprefix(f"{role}: ")
    )
    yield from (_part(role, "tool result", text) if role == "tool" else _marked(role, text))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        called = call.get("function", call) if isinstance(call, Mapping) else call
        yield from _part(role, "tool call", json.dumps(called, ensure_ascii=False))


def _marked(role: str, text: str) -> Iterator[Part]:
    """Return the parts of a text in which a model marks its thoughts and its calls of tools."""
    at = 0
    if (
        "</think>" in text and "<think" not in text.split("</think>", 1)[0]
    ):  # the template opened it
        thought, _, _ = text.partition("</think>")
        yield from _part(role, "thinking", thought)
        at = len(thought) + len("</think>")
    for match in _MARKED.finditer(text, at):
        yield from _part(role, "text", text[at : match.start()])
        name = next(name for name in _KINDS if match[name] is not None)
        yield from _part(role, _KINDS[name], match[name])
        at = match.end()
    yield from _part(role, "text", text[at:])


def _part(role: str, kind: str, text: str) -> Iterator[Part]:
    if text.strip():
        shown = text.strip("\n")
        more = f"… ({len(shown) - TEXT_MAX} more characters)" if len(shown) > TEXT_MAX else ""
        yield {"role": role, "kind": kind, "text": shown[:TEXT_MAX] + more}


def response_tokens(
    row: Mapping[str, Any], decode: Callable[[Sequence[int]], list[str]] | None
) -> dict[str, Any]:
    """Return the response's tokens: texts (their ids without `decode`), log-probs of both sides, which are trained on.

    `left` counts those after the first TOKENS_MAX. A list is empty where the row has none, or one of another length.
    """
    tokens, count = row.get("tokens"), row.get("response_length")
    if not isinstance(tokens, list) or not isinstance(count, int) or not 0 < count <= len(tokens):
        return {
            "texts": [],
            "log_probs": [],
            "trainer": [],
            "trained": [],
            "left": 0,
            "decoded": False,
        }
    ids = tokens[-count:]
    usable = decode is not None and all(isinstance(item, int) and 0 <= item < 2**31 for item in ids)
    shown = ids[:TOKENS_MAX]
    return {
        "texts": decode(shown) if decode and usable else [str(item) for item in shown],
        "decoded": usable,
        "log_probs": _numbers(row.get("rollout_log_probs"), count),
        "trainer": _numbers(row.get("trainer_log_probs"), count),
        "trained": [bool(item) for item in _last(row.get("loss_mask"), len(tokens), count)],
        "left": count - len(shown),
    }


def _numbers(values: Any, count: int) -> list[float | None]:
    found = _last(values, count, count)
    return [round(float(item), DECIMALS) if is_number(item) else None for item in found]


def _last(values: Any, length: int, count: int) -> list[Any]:
    """Return the last `count` of a list of that length, as far as tokens are drawn; [] for anything else."""
    if not isinstance(values, list) or len(values) not in (length, count):
        return []
    return values[-count:][:TOKENS_MAX]
