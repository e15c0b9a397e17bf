"""What a row means: from columns to a conversation to train on, and to a prompt to answer. Pure; no tokenizer.

messages         {"messages": [{"role", "content"}, ...]}      roles system, user, assistant, tool
question_answer  {"question", "answer"}                        strings
gsm8k            {"question", "answer": "... #### 72"}         the calculator's <<48/2=24>> stays as plain text
"""

from dataclasses import dataclass
from typing import Any, Literal

from rollouts.training.datasets.rows import DataError, Row
from rollouts.training.rewards import gsm8k_number

Format = Literal["messages", "question_answer", "gsm8k"]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A row as a conversation and as a prompt; SFT takes the one, RL and evaluation the other."""

    where: str
    messages: list[dict[str, Any]]  # the whole conversation
    prompt: dict[str, Any]  # "messages" without a final assistant turn, "answer" where known, "format", other columns


def parse_row(row: Row, format: Format | None = None) -> Example:
    """Read a row in `format`, or in the one its columns show. Raises DataError naming row, value and need."""
    chosen = format or infer_format(row)
    if chosen == "messages":
        return _from_messages(row)
    if chosen in ("question_answer", "gsm8k"):
        return _from_question(row, chosen)
    raise DataError(f"format={chosen!r}: needs one of 'messages', 'question_answer', 'gsm8k'")


def infer_format(row: Row) -> Format:
    """The format that the columns alone show; "gsm8k" is told from "question_answer" by its `####`."""
    values = row.values
    if "messages" in values:
        return "messages"
    if "question" in values:
        return "gsm8k" if gsm8k_number(str(values.get("answer", ""))) else "question_answer"
    raise DataError(f"{row.where}: columns {sorted(values)}; needs 'messages', or 'question' and 'answer'")


def _from_messages(row: Row) -> Example:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: messages={messages!r}; needs a list of {{'role', 'content'}}")
    clean = [_check_message(message, f"{row.where}: messages[{index}]") for index, message in enumerate(messages)]
    others = {key: value for key, value in row.values.items() if key != "messages"}
    ends_with_answer = clean[-1]["role"] == "assistant"
    if len(clean) == 1 and ends_with_answer:
        raise DataError(f"{row.where}: the only message is the assistant's; needs one to answer before it")
    prompt: dict[str, Any] = {"format": "messages", **others}
    if ends_with_answer:
        prompt.setdefault("answer", clean[-1]["content"])
    prompt["messages"] = clean[:-1] if ends_with_answer else clean
    return Example(row.where, clean, prompt)


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}={message!r}; needs an object with 'role' and 'content'")
    clean = {key: value for key, value in message.items() if value is not None}  # Arrow fills missing keys with null
    if clean.get("role") not in ROLES:
        raise DataError(f"{where}.role={clean.get('role')!r}; needs one of {', '.join(ROLES)}")
    if not isinstance(clean.get("content"), str):
        raise DataError(f"{where}.content={clean.get('content')!r}; needs a string")
    return clean


def _from_question(row: Row, format: Format) -> Example:
    for column in ("question", "answer"):
        value = row.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{row.where}: {column}={value!r}; format {format!r} needs a string that is not empty "
                f"(columns: {sorted(row.values)})"
            )
    question, answer = row.values["question"], row.values["answer"]
    user = {"role": "user", "content": question}
    expected: str | None = answer
    if format == "gsm8k":
        expected = gsm8k_number(answer)
        if expected is None:
            raise DataError(f"{row.where}: answer={answer[-60:]!r}; format 'gsm8k' needs '#### <number>' in it")
    others = {key: value for key, value in row.values.items() if key not in ("question", "answer")}
    prompt = {"format": format, **others, "messages": [user], "answer": expected}
    return Example(row.where, [user, {"role": "assistant", "content": answer}], prompt)
