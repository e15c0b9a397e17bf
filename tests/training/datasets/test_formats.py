"""Rows as conversations and as prompts."""

from typing import Any

import pytest

from rollouts.data_formats import parse_row
from rollouts.data_formats.row import DataError, Row
from rollouts.training.rewards import gsm8k_number

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def row(**values: Any) -> Row:
    return Row("f.jsonl:7", values)


def test_messages_become_conversation_and_prompt() -> None:
    """Goal: the prompt lacks only the final answer, its reference; other columns stay. Red without `others`."""
    example = parse_row(row(messages=[USER, ASSISTANT, USER, ASSISTANT], level=3), "messages")
    assert example.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert example.prompt == {
        "messages": [USER, ASSISTANT, USER],
        "answer": "4",
        "format": "messages",
        "level": 3,
    }


def test_messages_without_an_answer_are_a_prompt() -> None:
    """Goal: RL data may end with the user; its own answer column counts. Red when an assistant turn was required."""
    assert parse_row(row(messages=[USER])).prompt == {"messages": [USER], "format": "messages"}
    own = parse_row(row(messages=[USER, ASSISTANT], answer="four")).prompt
    assert own["answer"] == "four" and own["messages"] == [USER]


def test_nulls_of_a_message_are_left_out() -> None:
    """Goal: Arrow's filled-in nulls do not reach the template. Red without the filter."""
    assert parse_row(row(messages=[{**USER, "name": None}, ASSISTANT])).messages == [
        USER,
        ASSISTANT,
    ]


def test_question_answer() -> None:
    """Goal: one user and one assistant turn, the answer as it stands. Red with the answer stripped."""
    example = parse_row(row(question="abc", answer=" cba", id=1))
    assert [message["content"] for message in example.messages] == ["abc", " cba"]
    assert example.prompt == {
        "messages": [{"role": "user", "content": "abc"}],
        "answer": " cba",
        "format": "question_answer",
        "id": 1,
    }


def test_gsm8k_keeps_the_calculator_as_text_and_finds_the_number() -> None:
    """Goal: SFT sees the whole solution, the reward the bare number. Red when the whole solution was the answer."""
    text = "Half is <<48/2=24>>24.\n#### 1,024"
    example = parse_row(row(question="How many?", answer=text))
    assert example.messages[-1]["content"] == text
    assert example.prompt["answer"] == "1024" and example.prompt["format"] == "gsm8k"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("#### -3.5 apples", "-3.5"),
        ("a #### 1,000\n#### 2", "1000"),
        ("####72", None),
        ("72", None),
    ],
)
def test_gsm8k_number(text: str, number: str | None) -> None:
    """Goal: nanochat's pattern: one space, sign, commas out, the first one. Red with `\\s*` for the space."""
    assert gsm8k_number(text) == number


@pytest.mark.parametrize(
    ("format", "values", "message"),
    [
        ("messages", {"messages": []}, r"messages=\[\]; needs a list"),
        ("messages", {"text": "x"}, "messages=None; needs a list"),
        ("messages", {"messages": ["x"]}, r"messages\[0\]='x'; needs an object"),
        (
            "messages",
            {"messages": [{"role": "bot", "content": "x"}]},
            r"messages\[0\].role='bot'; needs one of system",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant"}]},
            r"messages\[1\].content=None; needs a string",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "user", "content": 3}]},
            r"messages\[1\].content=3; needs a string",
        ),
        ("messages", {"messages": [ASSISTANT]}, "the only message is the assistant's"),
        (
            "question_answer",
            {"question": "x"},
            "answer=None; format 'question_answer' needs a string",
        ),
        ("question_answer", {"question": " ", "answer": "x"}, "question=' '; format"),
        ("question_answer", {"question": "x", "answer": 3}, "answer=3; format"),
        (
            "gsm8k",
            {"question": "x", "answer": "72"},
            "answer='72'; format 'gsm8k' needs '#### <number>'",
        ),
        (
            None,
            {"body": "x"},
            r"columns \['body'\]; needs 'messages', 'choices', 'question' and 'answer', or 'text'",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    format: Any, values: dict[str, Any], message: str
) -> None:
    """Goal: where, the value, the need. Each line was red with its check taken out (KeyError, or silence)."""
    with pytest.raises(DataError, match=r"^f.jsonl:7: " + message):
        parse_row(row(**values), format)


def test_an_unknown_format_is_named() -> None:
    """Goal: a typo in a library call says what there is. Red when it fell through to gsm8k."""
    with pytest.raises(DataError, match="format='chatml': needs one of 'messages'"):
        parse_row(row(question="x", answer="y"), "chatml")  # type: ignore[arg-type]
