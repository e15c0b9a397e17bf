"""Formats of rows: from columns to a conversation to train on, and to a prompt to answer. Pure; no tokenizer.

messages          {"messages": [{"role", "content"}, ...]}      roles system, user, assistant, tool
question_answer   {"question", "answer"}                        strings
gsm8k             {"question", "answer": "... #### 72"}         the calculator's <<48/2=24>> stays as plain text
gsm8k_calculator  the same                                      <<48/2=24>> becomes a tool call and the tool's answer
multiple_choice   {"question", "choices": {"text", "label"}, "answerKey"}    as allenai/ai2_arc
smoltalk          {"messages"}                                  a system message goes into the first user turn
custom_json       {"messages"}, or an array as the whole line   user and assistant alternate
spelling_bee      made by spelling.py                           count a letter, by hand and by calculator
simple_spelling   made by spelling.py
text              {"text"}                                      every token after the first is trained
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from rollouts.training.calculator import CALCULATOR_TOOL
from rollouts.training.datasets.calculator_turns import solution_turns
from rollouts.training.datasets.examples import Example, check_message, check_turns, conversation_example, example
from rollouts.training.datasets.rows import DataError, Row
from rollouts.training.rewards import gsm8k_number

Format = Literal[
    "messages",
    "question_answer",
    "gsm8k",
    "gsm8k_calculator",
    "multiple_choice",
    "smoltalk",
    "custom_json",
    "spelling_bee",
    "simple_spelling",
    "text",
]


def parse_row(row: Row, format: Format | None = None) -> Example:
    """Read a row in `format`, or by its columns. Raises DataError naming row, value and need."""
    chosen = format or infer_format(row)
    if chosen not in _PARSERS:
        raise DataError(f"format={chosen!r}: needs one of {', '.join(map(repr, get_args(Format)))}")
    return _PARSERS[chosen](row)


def infer_format(row: Row) -> Format:
    """Return the format that the columns show; `####` tells "gsm8k" from "question_answer"."""
    values = row.values
    if "messages" in values:
        return "messages"
    if "choices" in values:
        return "multiple_choice"
    if "question" in values:
        return "gsm8k" if gsm8k_number(str(values.get("answer", ""))) else "question_answer"
    if "text" in values:
        return "text"
    raise DataError(
        f"{row.where}: columns {sorted(values)}; needs 'messages', 'question' and 'answer', 'choices', or 'text'"
    )


def _messages(row: Row) -> Example:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: messages={messages!r}; needs a list of {{'role', 'content'}}")
    clean = [check_message(message, f"{row.where}: messages[{index}]") for index, message in enumerate(messages)]
    return conversation_example(row.where, clean, _others(row, "messages"), format="messages")


def _custom_json(row: Row) -> Example:
    messages = check_turns(row.values.get("messages"), row.where)
    return conversation_example(row.where, messages, _others(row, "messages"), format="custom_json")


def _smoltalk(row: Row) -> Example:
    messages = row.values.get("messages")
    if isinstance(messages, list) and messages and _role(messages[0]) == "system":
        system = check_message(messages[0], f"{row.where}: messages[0]")["content"]
        user, *rest = check_turns(messages[1:], f"{row.where} after its system message")
        clean = [{**user, "content": f"{system}\n\n{user['content']}"}, *rest]
    else:
        clean = check_turns(messages, row.where)
    return conversation_example(row.where, clean, _others(row, "messages"), format="smoltalk")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _question_answer(row: Row) -> Example:
    question, answer = _strings(row, "question_answer", "question", "answer")
    return _one_turn(row, "question_answer", question, answer, answer=answer)


def _gsm8k(row: Row) -> Example:
    question, solution, number = _gsm8k_parts(row, "gsm8k")
    return _one_turn(row, "gsm8k", question, solution, answer=number)


def _gsm8k_calculator(row: Row) -> Example:
    question, solution, number = _gsm8k_parts(row, "gsm8k_calculator")
    user = {"role": "user", "content": question}
    own = {"format": "gsm8k_calculator", "tools": [CALCULATOR_TOOL], "messages": [user], "answer": number}
    return example(row.where, [user, *solution_turns(solution)], _others(row, "question", "answer"), own)


def _gsm8k_parts(row: Row, format: Format) -> tuple[str, str, str]:
    question, solution = _strings(row, format, "question", "answer")
    number = gsm8k_number(solution)
    if number is None:
        raise DataError(f"{row.where}: answer={solution[-60:]!r}; format {format!r} needs '#### <number>' in it")
    return question, solution, number


def _multiple_choice(row: Row) -> Example:
    """Put the letter after its choice, without a space: small models bind it better, and `A` is one token."""
    (question,) = _strings(row, "multiple_choice", "question")
    choices, key = row.values.get("choices"), row.values.get("answerKey")
    columns = [choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label")]
    texts, labels = [items if isinstance(items, list) else [] for items in columns]
    if not texts or len(texts) != len(labels) or not all(isinstance(item, str) for item in (*texts, *labels)):
        raise DataError(
            f"{row.where}: choices={choices!r}; format 'multiple_choice' needs {{'text': [...], 'label': [...]}}, "
            "as many strings in both"
        )
    if not isinstance(key, str) or key not in labels:
        raise DataError(f"{row.where}: answerKey={key!r}; needs one of the labels {labels}")
    lines = "".join(f"- {text}={label}\n" for text, label in zip(texts, labels, strict=True))
    content = f"Multiple choice question: {question}\n{lines}\nAnswer with the letter of the right choice alone."
    own = {"format": "multiple_choice", "letters": labels, "messages": [{"role": "user", "content": content}]}
    turns = [*own["messages"], {"role": "assistant", "content": key}]
    return example(row.where, turns, _others(row, "question", "choices", "answerKey"), {**own, "answer": key})


def _spelling_bee(row: Row) -> Example:
    messages = row.values["messages"]
    own = {"format": "spelling_bee", "tools": [CALCULATOR_TOOL], "messages": messages[:1]}
    return example(row.where, messages, _others(row, "messages"), own)


def _simple_spelling(row: Row) -> Example:
    return conversation_example(row.where, row.values["messages"], _others(row, "messages"), format="simple_spelling")


def _text(row: Row) -> Example:
    text = row.values.get("text")
    if not isinstance(text, str):
        raise DataError(f"{row.where}: text={text!r}; format 'text' needs a string (columns: {sorted(row.values)})")
    return example(row.where, [], _others(row, "text"), {"format": "text"}, text=text)


def _one_turn(row: Row, format: Format, question: str, reply: str, *, answer: str) -> Example:
    user = {"role": "user", "content": question}
    own = {"format": format, "messages": [user], "answer": answer}
    turns = [user, {"role": "assistant", "content": reply}]
    return example(row.where, turns, _others(row, "question", "answer"), own)


def _strings(row: Row, format: Format, *columns: str) -> list[str]:
    for column in columns:
        value = row.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{row.where}: {column}={value!r}; format {format!r} needs a string that is not empty "
                f"(columns: {sorted(row.values)})"
            )
    return [row.values[column] for column in columns]


def _others(row: Row, *columns: str) -> dict[str, Any]:
    return {key: value for key, value in row.values.items() if key not in columns}


_PARSERS: Mapping[str, Callable[[Row], Example]] = {
    "messages": _messages,
    "question_answer": _question_answer,
    "gsm8k": _gsm8k,
    "gsm8k_calculator": _gsm8k_calculator,
    "multiple_choice": _multiple_choice,
    "smoltalk": _smoltalk,
    "custom_json": _custom_json,
    "spelling_bee": _spelling_bee,
    "simple_spelling": _simple_spelling,
    "text": _text,
}
