"""Tool calls read out of text, in both formats, and what cannot be read."""

import pytest

from rollouts.agents.tool_calls import parse_message

CALL = '{"name": "calculator", "arguments": {"expression": "48/2"}}'
PARSED = {"name": "calculator", "arguments": {"expression": "48/2"}}


def names(message):
    return [call["function"] for call in message.get("tool_calls", [])]


def test_hermes_calls_stand_in_tags_beside_content():
    """Goal: every tagged call in order, the rest is content. Red with a greedy pattern: two calls were read as one."""
    message, problems = parse_message(
        f"So:\n<tool_call>\n{CALL}\n</tool_call><tool_call>{CALL}</tool_call>", "hermes"
    )
    assert (message["role"], message["content"], problems) == ("assistant", "So:", [])
    assert names(message) == [PARSED, PARSED]


def test_json_calls_are_the_whole_text():
    """Goal: Llama's form, "parameters" included; other text is content. Red with "arguments" alone looked for."""
    message, problems = parse_message(CALL.replace("arguments", "parameters"), "json")
    assert (names(message), message["content"], problems) == ([PARSED], "", [])
    assert parse_message("The answer is {24}.", "json") == (
        {"role": "assistant", "content": "The answer is {24}."},
        [],
    )


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"name": "calculator", ', "error: the tool call is not JSON: "),
        ('["calculator"]', "error: a tool call needs"),
        ('{"name": 3, "arguments": {}}', "error: a tool call needs"),
        ('{"name": "calculator", "arguments": "48/2"}', "error: a tool call needs"),
    ],
)
def test_what_cannot_be_read_is_said(body, problem):
    """Goal: a broken call is told to the model, never raised or dropped. Red with json.loads unguarded."""
    message, problems = parse_message(f"<tool_call>{body}</tool_call>", "hermes")
    assert "tool_calls" not in message
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_a_format_that_is_not_known_is_refused():
    """Goal: the message lists the formats. Red with the format taken as hermes."""
    with pytest.raises(ValueError, match="tool_format='xml': needs one of 'hermes', 'json'"):
        parse_message("", "xml")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"I use <tool_call> tags. <tool_call>{CALL}</tool_call>", "I use <tool_call> tags."),
        (f"<tool_call>{CALL}", ""),
        (f"<tool_call>{CALL}\n<tool_call>{CALL}</tool_call>", ""),
        ("A <tool_call> is how I would call.", "A <tool_call> is how I would call."),
    ],
)
def test_tags_that_are_spoken_of_or_not_closed(text, content):
    """Goal: each call is read, prose stays prose. Red with a pattern that pairs any opener with the next closer."""
    message, problems = parse_message(text, "hermes")
    assert (message["content"], problems) == (content, [])
    assert names(message) == [PARSED] * text.count(CALL)


def test_a_call_may_hold_tags_and_may_be_cut_off():
    """Goal: a call ends where its JSON does; one that is cut off is told. Red with the first closing tag as its end."""
    body = '{"name": "write", "arguments": {"text": "</tool_call> and <tool_call>"}}'
    message, problems = parse_message(f"<tool_call>{body}</tool_call>!", "hermes")
    assert (names(message)[0]["arguments"]["text"], message["content"], problems) == (
        "</tool_call> and <tool_call>",
        "!",
        [],
    )
    message, problems = parse_message('So: <tool_call>{"name": "calc', "hermes")
    assert "tool_calls" not in message and problems[0].startswith(
        "error: the tool call is not JSON"
    )
    assert names(
        parse_message('\n{ "name": "calculator", "parameters": {"expression": "48/2"}}', "json")[0]
    ) == [PARSED]
