"""nanochat's tasks, from a row as its data set has it to the conversation that is trained on."""

from typing import Any

import pytest

from rollouts.data_formats import parse_row
from rollouts.data_formats.calculator_turns import CALCULATOR_TOOL
from rollouts.data_formats.row import DataError, Row

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}
ARC = {
    "id": "Mercury_1",
    "question": "What is hot?",
    "choices": {"text": ["ice", "the sun"], "label": ["A", "B"]},
    "answerKey": "B",
}


def row(**values: Any) -> Row:
    return Row("f.jsonl:7", values)


def test_multiple_choice() -> None:
    """Goal: the letter after its choice without a space, the bare letter as the answer. Red with `A) ice`."""
    example = parse_row(row(**ARC))
    user, assistant = example.messages
    assert "What is hot?\n- ice=A\n- the sun=B\n" in user["content"] and assistant["content"] == "B"
    assert example.prompt == {
        "format": "multiple_choice",
        "id": "Mercury_1",
        "letters": ["A", "B"],
        "messages": [user],
        "answer": "B",
    }


def test_gsm8k_with_calculator_calls() -> None:
    """Goal: text, call, result, text, in nanochat's order; the prompt is the question, its answer the number.

    Red when the annotation stayed in the text, and when the prompt held the calls.
    """
    solution = (
        "Weng earns 12/60 = $<<12/60=0.2>>0.2 a minute.\nThat is <<0.2*50=10>>10.\n#### 1,010"
    )
    example = parse_row(row(question="How much?", answer=solution, id=3), "gsm8k_calculator")
    user, *turns = example.messages
    assert [turn["role"] for turn in turns] == [
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [turn["content"] for turn in turns] == [
        "Weng earns 12/60 = $",
        "0.2",
        "0.2 a minute.\nThat is ",
        "10",
        "10.\n#### 1,010",
    ]
    functions = [turn["tool_calls"][0]["function"] for turn in turns if "tool_calls" in turn]
    assert functions == [
        {"name": "calculator", "arguments": {"expression": "12/60"}},
        {"name": "calculator", "arguments": {"expression": "0.2*50"}},
    ]
    ids = [turn["tool_calls"][0]["id"] for turn in turns if "tool_calls" in turn]
    assert (
        ids
        == [turn["tool_call_id"] for turn in turns if turn["role"] == "tool"]
        == ["call00000", "call00001"]
    )
    assert example.prompt == {
        "format": "gsm8k_calculator",
        "id": 3,
        "tools": [CALCULATOR_TOOL],
        "messages": [user],
        "answer": "1010",
    }


@pytest.mark.parametrize(
    ("solution", "contents"),
    [
        ("#### 5", ["#### 5"]),
        ("<<1+1=2>>2\n#### 2", ["", "2", "2\n#### 2"]),
        ("<<1=1=1>> #### 1", ["", "1", " #### 1"]),  # the result is after the last sign
        ("a <<6>>6 #### 6", ["a <<6>>6 #### 6"]),  # no result: left as it is
    ],
)
def test_odd_annotations(solution: str, contents: list[str]) -> None:
    """Goal: GSM8K's own irregular rows lose nothing. Red when `<<6>>` became a call with an empty result."""
    example = parse_row(row(question="q", answer=solution), "gsm8k_calculator")
    assert [message["content"] for message in example.messages[1:]] == contents


def test_smoltalk_merges_the_system_message() -> None:
    """Goal: the system message opens the first user turn, as in nanochat. Red when it stayed, and when it was lost."""
    example = parse_row(
        row(messages=[SYSTEM, USER, ASSISTANT, USER, ASSISTANT], source="x"), "smoltalk"
    )
    merged = {"role": "user", "content": "be brief\n\nhi"}
    assert example.messages == [merged, ASSISTANT, USER, ASSISTANT]
    assert (
        example.prompt["messages"] == [merged, ASSISTANT, USER] and example.prompt["source"] == "x"
    )
    assert parse_row(row(messages=[USER, ASSISTANT]), "smoltalk").messages == [USER, ASSISTANT]


def test_custom_json_and_text() -> None:
    """Goal: a conversation as it stands; a text as it stands, blanks and all. Red with the text stripped."""
    example = parse_row(row(messages=[USER, ASSISTANT]), "custom_json")
    assert example.messages == [USER, ASSISTANT] and example.prompt["format"] == "custom_json"
    text = parse_row(row(text=" a\n", url="u"))
    assert (
        text.text == " a\n"
        and text.messages == []
        and text.prompt == {"format": "text", "url": "u"}
    )


def test_a_call_needs_no_text() -> None:
    """Goal: an assistant that only calls a tool has no content in many data sets. Red when a string was required."""
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    assert parse_row(row(messages=[USER, call])).messages[1] == {**call, "content": ""}


@pytest.mark.parametrize(
    ("format", "values", "message"),
    [
        (
            "multiple_choice",
            {**ARC, "answerKey": "C"},
            r"answerKey='C'; needs one of the labels \['A', 'B'\]",
        ),
        ("multiple_choice", {**ARC, "answerKey": None}, "answerKey=None"),
        (
            "multiple_choice",
            {**ARC, "choices": ["ice"]},
            r"choices=\['ice'\]; format 'multiple_choice' needs {'text'",
        ),
        (
            "multiple_choice",
            {**ARC, "choices": {"text": ["a"], "label": ["A", "B"]}},
            "choices=.*as many strings",
        ),
        (
            "multiple_choice",
            {**ARC, "choices": {"text": [1], "label": ["B"]}},
            "choices=.*as many strings",
        ),
        ("multiple_choice", {**ARC, "question": ""}, "question=''"),
        (
            "gsm8k_calculator",
            {"question": "x", "answer": "<<1+1=2>>2"},
            "needs '#### <number>' in it",
        ),
        (
            "smoltalk",
            {"messages": [SYSTEM, USER]},
            " after its system message: messages=.*needs at least two",
        ),
        (
            "smoltalk",
            {"messages": [SYSTEM]},
            " after its system message: messages=.*needs at least two",
        ),
        (
            "smoltalk",
            {"messages": [USER, SYSTEM]},
            r"messages\[1\].role='system'; needs 'assistant'",
        ),
        ("smoltalk", {}, "messages=None; needs at least two"),
        ("custom_json", {"messages": [USER]}, "needs at least two"),
        (
            "custom_json",
            {"messages": [SYSTEM, USER, ASSISTANT]},
            r"messages\[0\].role='system'; needs 'user'",
        ),
        (
            "custom_json",
            {"messages": [USER, ASSISTANT, ASSISTANT]},
            r"messages\[2\].role='assistant'; needs 'user'",
        ),
        (
            "custom_json",
            {"messages": [USER, {**ASSISTANT, "content": 3}]},
            r"messages\[1\].content=3; needs a string",
        ),
        (
            "custom_json",
            {"messages": [USER, {**ASSISTANT, "content": ["x"]}]},
            r"messages\[1\].content=\['x'\]; needs",
        ),
        ("text", {"text": 3}, "text=3; format 'text' needs a string"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    format: Any, values: dict[str, Any], message: str
) -> None:
    """Goal: where, the value, the need. Each line was red with its check taken out (KeyError, or silence)."""
    if not message.startswith(" "):
        message = ": .*" + message if message.startswith("needs") else ": " + message
    with pytest.raises(DataError, match=r"^f.jsonl:7" + message):
        parse_row(row(**values), format)
