"""Tool calls read out of text, in both formats, and what cannot be read."""

import pytest

from rollouts.agents.tool_calls import parse_message

CALL = '{"name": "calculator", "arguments": {"expression": "48/2"}}'
PARSED = {"name": "calculator", "arguments": {"expression": "48/2"}}


def names(message):
    return [call["function"] for call in message.get("tool_calls", [])]


def test_hermes_calls_stand_in_tags_beside_content():
    """Goal: every tagged call in order, the rest is content. Red with a greedy pattern: two calls were read as one."""
    message, problems = parse_message(f"So:\n<tool_call>\n{CALL}\n</tool_call><tool_call>{CALL}</tool_call>", "hermes")
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
