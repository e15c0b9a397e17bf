"""Formats of rows: from columns to a conversation to train on, and to a prompt to answer. Pure; no tokenizer.

A new format is a function and a declaration in FORMATS: all other parts read that. What each row looks like:
docs/reference/data-formats.md.
"""

from typing import Any

from rollouts.data_formats.calculator_turns import CALCULATOR_TOOL, solution_turns
from rollouts.data_formats.declared import DataFormat
from rollouts.data_formats.examples import (
    Example,
    Message,
    check_message,
    check_turns,
    conversation_example,
    example,
)
from rollouts.data_formats.gsm8k import gsm8k_number
from rollouts.data_formats.row import DataError, Row


def _messages(row: Row, others: dict[str, Any], name: str) -> Example:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{row.where}: messages={messages!r}; needs a list of {{'role', 'content'}}"
        )
    clean = [
        check_message(message, f"{row.where}: messages[{index}]")
        for index, message in enumerate(messages)
    ]
    return conversation_example(row.where, clean, others, format=name)


def _turns(row: Row, others: dict[str, Any], name: str) -> Example:
    messages = check_turns(row.values.get("messages"), row.where)
    return conversation_example(row.where, messages, others, format=name)


def _smoltalk(row: Row, others: dict[str, Any], name: str) -> Example:
    """Put a system message into the first user turn."""
    messages = row.values.get("messages")
    if isinstance(messages, list) and messages and _role(messages[0]) == "system":
        system = check_message(messages[0], f"{row.where}: messages[0]")["content"]
        user, *rest = check_turns(messages[1:], f"{row.where} after its system message")
        clean = [{**user, "content": f"{system}\n\n{user['content']}"}, *rest]
    else:
        clean = check_turns(messages, row.where)
    return conversation_example(row.where, clean, others, format=name)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _question_answer(row: Row, others: dict[str, Any], name: str) -> Example:
    answer = row.values["answer"]
    turns = [_user(row.values["question"]), _assistant(answer)]
    return conversation_example(row.where, turns, others, format=name, answer=answer)


def _gsm8k(row: Row, others: dict[str, Any], name: str) -> Example:
    """Leave the calculator's <<48/2=24>> as plain text; the answer is the number alone."""
    turns = [_user(row.values["question"]), _assistant(row.values["answer"])]
    number = _gsm8k_number(row, name)
    return conversation_example(row.where, turns, others, format=name, answer=number)


def _gsm8k_calculator(row: Row, others: dict[str, Any], name: str) -> Example:
    """Make <<48/2=24>> a tool call and the tool's answer."""
    user = _user(row.values["question"])
    own = {
        "format": name,
        "tools": [CALCULATOR_TOOL],
        "messages": [user],
        "answer": _gsm8k_number(row, name),
    }
    return example(row.where, [user, *solution_turns(row.values["answer"])], others, own)


def _gsm8k_number(row: Row, name: str) -> str:
    solution = row.values["answer"]
    number = gsm8k_number(solution)
    if number is None:
        raise DataError(
            f"{row.where}: answer={solution[-60:]!r}; format {name!r} needs '#### <number>' in it"
        )
    return number


def _multiple_choice(row: Row, others: dict[str, Any], name: str) -> Example:
    """Put the letter after its choice, without a space: small models bind it better, and `A` is one token."""
    choices, key = row.values.get("choices"), row.values["answerKey"]
    columns = [choices.get(part) if isinstance(choices, dict) else None for part in CHOICE_PARTS]
    texts, labels = [items if isinstance(items, list) else [] for items in columns]
    if (
        not texts
        or len(texts) != len(labels)
        or not all(isinstance(item, str) for item in (*texts, *labels))
    ):
        raise DataError(
            f"{row.where}: choices={choices!r}; format {name!r} needs {{'text': [...], 'label': [...]}}, "
            "as many strings in both"
        )
    if key not in labels:
        raise DataError(f"{row.where}: answerKey={key!r}; needs one of the labels {labels}")
    lines = "".join(f"- {text}={label}\n" for text, label in zip(texts, labels, strict=True))
    user = _user(
        f"Multiple choice question: {row.values['question']}\n{lines}\n"
        "Answer with the letter of the right choice alone."
    )
    own = {"format": name, "letters": labels, "messages": [user], "answer": key}
    return example(row.where, [user, _assistant(key)], others, own)


CHOICE_PARTS = ("text", "label")


def _spelling_bee(row: Row, others: dict[str, Any], name: str) -> Example:
    messages = row.values["messages"]
    own = {"format": name, "tools": [CALCULATOR_TOOL], "messages": messages[:1]}
    return example(row.where, messages, others, own)


def _as_made(row: Row, others: dict[str, Any], name: str) -> Example:
    return conversation_example(row.where, row.values["messages"], others, format=name)


def _text(row: Row, others: dict[str, Any], name: str) -> Example:
    return example(row.where, [], others, {"format": name}, text=row.values["text"])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# A row without a named format is of the first that it shows
FORMATS: tuple[DataFormat, ...] = (
    DataFormat(
        name="messages",
        columns={"messages": "messages"},
        example=_messages,
        known_by=("messages",),
    ),
    DataFormat(
        name="multiple_choice",
        columns={"question": "text", "answerKey": "text", "choices": "choices"},
        example=_multiple_choice,
        known_by=("choices",),
        adds=("letters",),
        judge="choice_letter",
        usual_reward="rollouts.training.rewards.exact_match",
    ),
    DataFormat(
        name="gsm8k",
        columns={"question": "text", "answer": "text"},
        example=_gsm8k,
        known_by=("question", "answer"),
        known_if=lambda row: gsm8k_number(str(row["answer"])) is not None,
        judge="gsm8k_answer",
        usual_reward="rollouts.training.rewards.math_verify",
    ),
    DataFormat(
        name="gsm8k_calculator",
        columns={"question": "text", "answer": "text"},
        example=_gsm8k_calculator,
        adds=("tools",),
        judge="gsm8k_answer",
    ),
    DataFormat(
        name="question_answer",
        columns={"question": "text", "answer": "text"},
        example=_question_answer,
        known_by=("question", "answer"),
    ),
    DataFormat(name="smoltalk", columns={"messages": "messages"}, example=_smoltalk),
    DataFormat(
        name="custom_json",
        columns={"messages": "messages"},
        example=_turns,
        is_array=True,
    ),
    DataFormat(
        name="spelling_bee",
        columns={"messages": "messages"},
        example=_spelling_bee,
        made_here=True,
        adds=("tools",),
        judge="gsm8k_answer",
    ),
    DataFormat(
        name="simple_spelling",
        columns={"messages": "messages"},
        example=_as_made,
        made_here=True,
    ),
    DataFormat(
        name="text",
        columns={"text": "text or empty"},
        example=_text,
        known_by=("text",),
        has_prompts=False,
    ),
)
