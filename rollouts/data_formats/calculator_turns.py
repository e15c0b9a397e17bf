"""Calculator calls as messages, in the form that chat templates take. Pure."""

import re
from typing import Any

from rollouts.data_formats.examples import Message

ANNOTATION = re.compile(r"<<([^<>]+)=([^<>=]*)>>")  # GSM8K's: <<48/2=24>>
# its description for models, in SFT data and environments alike
CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "Numbers with + - * / ( ), or 'text'.count('part').",
                }
            },
            "required": ["expression"],
        },
    },
}


def calculator_turns(text: str, expression: str, result: str, number: int) -> list[Message]:
    """Return the assistant's text and call, then the tool's answer. `number` counts a conversation's calls from 0."""
    call_id = f"call{number:05d}"  # nine letters or digits: Mistral's templates insist
    function = {"name": "calculator", "arguments": {"expression": expression}}
    call = {"id": call_id, "type": "function", "function": function}
    return [
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "tool_call_id": call_id, "content": result},
    ]


def solution_turns(solution: str) -> list[Message]:
    """Return a GSM8K solution as turns: text, call, result, text, ...; the last turn is text with the answer in it."""
    # text, expression, result, text, expression, result, ..., text
    *parts, last = ANNOTATION.split(solution)
    turns: list[Message] = []
    for number in range(len(parts) // 3):
        text, expression, result = parts[3 * number : 3 * number + 3]
        turns += calculator_turns(text, expression, result, number)
    return [*turns, {"role": "assistant", "content": last}]
