"""Chat templates as models ship them: Qwen, Llama, Gemma, Mistral, SmolLM, and two with {% generation %} markers.

tests/training/datasets/families.py says how each writes what the assistant says; here every conversation is compared
with that text, and its tokens with those of `apply_chat_template`.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import (
    Conversation,
    render_conversation,
    render_conversations,
    render_prompt,
)
from rollouts.training.loops.batching import collate
from tests.training.datasets.families import FAMILIES, TOOLS, Family
from tests.training.datasets.test_chat import trained_spans

CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "6*7"}}}
SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
TOOL_CHAT = [
    {"role": "user", "content": "6*7?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '42 of "them"\nin all'},
    {"role": "assistant", "content": "It is 42."},
]
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
with_tools = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if family.tools],
    ids=lambda family: family.name,
)


def check(family: Family, messages: list[dict[str, Any]], tools: Any = None) -> list[Any]:
    """Every rendering is the template's of a beginning, token by token; each turn is trained once, all of it, alone."""
    tokenizer = family.tokenizer()
    renderings = render_conversation(tokenizer, messages, "f:1", tools=tools)
    for rendering in renderings:
        count = rendering.turns[-1] + 1 if rendering is not renderings[-1] else len(messages)
        expected = tokenizer.apply_chat_template(messages[:count], tools=tools, return_dict=False)
        assert rendering.token_ids == expected
        spoken = "".join(family.spoken(messages[turn]) for turn in rendering.turns)
        assert "".join(trained_spans(tokenizer, rendering)) == spoken
    turns = [turn for rendering in renderings for turn in rendering.turns]
    assert turns == [
        index for index, message in enumerate(messages) if message["role"] == "assistant"
    ]
    return renderings


@every_family
def test_turns_and_their_end_are_trained_and_nothing_else(family: Family) -> None:
    """Goal: verl#3562, trl#5988, Megatron-Bridge#3359 in every family; a default system message is never trained.

    Red with the header of the assistant in the span, with the token after the turn in it, and with the first turn's
    start at 0 (smollm and qwen2_5 then train their default system message).
    """
    renderings = check(family, CHAT)
    # it puts an empty thought into the last turn alone
    assert len(renderings) == (2 if family.name == "qwen3" else 1)
    if family.name in ("smollm", "qwen2_5"):
        text = family.tokenizer().decode(renderings[0].token_ids)
        assert text.startswith("<|im_start|>system\nYou are a helpful")


@every_family
def test_a_system_message_is_rendered_or_refused(family: Family) -> None:
    """Goal: never dropped. Red for gemma2 without the template's refusal turned into a DataError that names the row."""
    if not family.system:
        with pytest.raises(
            DataError, match=r"f:1: the chat template refuses .*'system'.*System role not supported"
        ):
            check(family, [SYSTEM, *CHAT])
        return
    renderings = check(family, [SYSTEM, *CHAT])
    assert all(
        "be brief" in family.tokenizer().decode(rendering.token_ids) for rendering in renderings
    )
    # Mistral's moves to the last question
    assert len(renderings) == (2 if family.name in ("qwen3", "mistral") else 1)


@with_tools
def test_calls_are_trained_and_results_are_not(family: Family) -> None:
    """Goal: tools (from the row's "tools"), a call, its result masked 0, the answer. Red when tools were not passed."""
    renderings = check(family, TOOL_CHAT, TOOLS)
    for rendering in renderings:
        assert "Evaluates an expression." in family.tokenizer().decode(rendering.token_ids)
    prompt = render_prompt(family.tokenizer(), {"messages": TOOL_CHAT[:3], "tools": TOOLS})
    ids, mask = renderings[-1].token_ids, renderings[-1].mask
    answer = [ids[i] for i in range(len(prompt), len(ids)) if mask[i]]
    assert ids[: len(prompt)] == prompt and family.tokenizer().decode(answer) == family.spoken(
        TOOL_CHAT[3]
    )


@with_tools
def test_calls_written_as_data_sets_hold_them(family: Family) -> None:
    """Goal: arguments as JSON text render as the plain object does, in OpenAI's form too. Red: JSON in JSON."""
    stored = {
        "type": "function",
        "id": None,
        "function": {**CALL["function"], "arguments": '{"expression": "6*7"}'},
    }
    bare = {**CALL["function"], "arguments": ' {"expression":"6*7"} '}
    plain = check(family, TOOL_CHAT, TOOLS)
    for call in (stored, {**CALL, "function": bare}):
        messages = [TOOL_CHAT[0], {**TOOL_CHAT[1], "tool_calls": [call]}, *TOOL_CHAT[2:]]
        assert render_conversation(family.tokenizer(), messages, "f:1", tools=TOOLS) == plain


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_text_that_a_template_drops_beside_a_call_is_an_error(name: str) -> None:
    """Goal: these templates write the call alone; the text is not lost in silence. Red without the check."""
    messages = [TOOL_CHAT[0], {**TOOL_CHAT[1], "content": "Let me see"}]
    with pytest.raises(
        DataError, match=r"f:1: messages\[1\]: the chat template leaves out content: .*Let me see"
    ):
        render_conversation(FAMILIES[name].tokenizer(), messages, "f:1", tools=TOOLS)
    with pytest.raises(
        DataError, match="leaves out the tool 'calculator': it does not support tools"
    ):
        render_conversation(FAMILIES["gemma3"].tokenizer(), CHAT, "f:1", tools=TOOLS)


def test_thinking_that_later_turns_strip_is_trained_where_it_was_spoken() -> None:
    """Goal: traps.md: such conversations split, and no thought is lost or repeated.

    Red with one rendering a conversation: the first answer was trained without its thought.
    """
    thoughts = [
        CHAT[0],
        {**CHAT[1], "reasoning_content": "greet"},
        CHAT[2],
        {**CHAT[3], "reasoning_content": "leave"},
    ]
    for name in ("qwen3", "marked_thinking"):
        first, second = check(FAMILIES[name], thoughts)
        decode = FAMILIES[name].tokenizer().decode
        assert "greet" in decode(first.token_ids) and "greet" not in decode(second.token_ids)
    inline = [
        CHAT[0],
        {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nyo"},
        *CHAT[2:],
    ]
    tokenizer = FAMILIES["qwen3"].tokenizer()
    renderings = render_conversation(tokenizer, inline, "f:1")
    assert trained_spans(tokenizer, renderings[0]) == ["<think>\ngreet\n</think>\n\nyo<|im_end|>"]


def test_thinking_between_calls_stays_in_one_piece() -> None:
    """Goal: no split where prefixes nest. Red with a piece per turn for every template that ever strips."""
    messages = [
        TOOL_CHAT[0],
        {**TOOL_CHAT[1], "reasoning_content": "multiply"},
        TOOL_CHAT[2],
        {**TOOL_CHAT[3], "reasoning_content": "say it"},
    ]
    assert [rendering.turns for rendering in check(FAMILIES["qwen3"], messages, TOOLS)] == [(1, 3)]


@every_family
def test_padding_with_the_end_of_turn_token_masks_no_end(family: Family) -> None:
    """Goal: trl#3091. Red with attention taken from `input_ids != pad_token_id`."""
    tokenizer = family.tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    long, short = (render_conversation(tokenizer, CHAT[:n], "f:1")[-1] for n in (4, 2))
    batch = collate(
        [long.token_ids, short.token_ids],
        [long.mask, short.mask],
        pad_token_id=tokenizer.pad_token_id,
    )
    real = len(short.token_ids)
    assert batch["attention_mask"][1].tolist() == [1] * real + [0] * (len(long.token_ids) - real)
    ends = [
        i for i in range(real) if short.token_ids[i] == tokenizer.eos_token_id and short.mask[i]
    ]
    assert len(ends) == 1 and all(batch["loss_mask"][1, i] == 1 for i in ends)


WORDS = st.text(st.sampled_from("abhi :\n'\"é🙂{"), max_size=12).map(lambda text: "x" + text + "y")


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> tuple[list[dict[str, Any]], Any]:
    """What this family's template can render: system message, exchanges, calls, thoughts, a question at the end."""
    messages = (
        [{"role": "system", "content": draw(WORDS)}]
        if family.system and draw(st.booleans())
        else []
    )
    uses_tools = family.tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2)) if uses_tools else 0):
            call = {
                "type": "function",
                "function": {"name": "calculator", "arguments": {"expression": draw(WORDS)}},
            }
            text = draw(WORDS) if family.calls_with_text and draw(st.booleans()) else ""
            messages.append(
                {
                    "role": "assistant",
                    "content": text,
                    "tool_calls": [call],
                    **draw(thoughts(family)),
                }
            )
            messages.append({"role": "tool", "content": draw(WORDS)})
        messages.append({"role": "assistant", "content": draw(WORDS), **draw(thoughts(family))})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(WORDS)})
    return messages, TOOLS if uses_tools else None


def thoughts(family: Family) -> st.SearchStrategy[dict[str, str]]:
    if not family.thinking:
        return st.just({})
    return st.one_of(st.just({}), WORDS.map(lambda text: {"reasoning_content": text}))


@every_family
@settings(max_examples=80)
@given(data=st.data())
def test_random_conversations(family: Family, data: st.DataObject) -> None:
    """Goal: trained text is the assistants' text with its ends, once, and tokens are the template's, in every family.

    Red with spans found by bisecting starts instead of ends (llama3's offsets leave white space out), and with
    `startswith` on the whole conversation alone (mistral with tools, qwen3).
    """
    messages, tools = data.draw(conversations(family))
    # the last rendering may then end before it: `check` knows whole ones
    if messages[-1]["role"] == "user":
        with_end = render_conversation(family.tokenizer(), messages, "f:1", tools=tools)
        turns = [turn for rendering in with_end for turn in rendering.turns]
        assert turns == [
            index for index, message in enumerate(messages) if message["role"] == "assistant"
        ]
        messages = messages[:-1]
    check(family, messages, tools)


def test_many_at_once_are_the_same_as_one_by_one() -> None:
    """Goal: one call changes nothing, and rows keep their order. Red with pieces dealt out wrongly."""
    family = FAMILIES["qwen3"]
    rows = [CHAT, TOOL_CHAT, CHAT[:2], [SYSTEM, *CHAT], CHAT[:1]]
    together = render_conversations(
        family.tokenizer(), [Conversation(row, "f:1", TOOLS) for row in rows]
    )
    assert together == [
        render_conversation(family.tokenizer(), row, "f:1", tools=TOOLS) for row in rows
    ]
