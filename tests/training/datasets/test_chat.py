"""Token ids and masks out of chat templates of several kinds, checked against what the ids decode to."""

from typing import Any

import pytest

from rollouts.training.datasets.chat import render_conversation, render_prompt
from rollouts.training.datasets.rows import DataError
from tests.training.tiny_task import tiny_tokenizer

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
)
MARKED_BEYOND_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}"
    "{% endfor %}"
)
NO_GENERATION_PROMPT = (  # as Mistral's: the assistant begins where the user's brackets end
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '<|end|>' }}"
    "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
)
STRIPS_EARLIER_TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content[:1] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def trained_spans(tokenizer: Any, ids: list[int], mask: list[float]) -> list[str]:
    """The trained stretches of text, special tokens and all."""
    assert len(ids) == len(mask) and set(mask) <= {0.0, 1.0}
    spans: list[list[int]] = []
    for position, (token, value) in enumerate(zip(ids, mask, strict=True)):
        if value and (position == 0 or not mask[position - 1]):
            spans.append([])
        if value:
            spans[-1].append(token)
    return [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize(
    "template",
    [None, CHATML, MARKED_WITHOUT_END, MARKED_BEYOND_END, NO_GENERATION_PROMPT],
    ids=["shipped", "chatml", "markers before the end token", "markers beyond it", "no generation prompt"],
)
def test_the_assistants_text_and_its_end_are_trained_and_nothing_else(template: str | None) -> None:
    """Goal: verl#3562, trl#5988, Megatron-Bridge#3359: every kind of template trains text and end token alone.

    Red for chatml and "beyond" when the newline after the end token was trained (or the next turn's first token), for
    "before" when only the marked span was.
    """
    tokenizer = tiny_tokenizer(template)
    ids, mask = render_conversation(tokenizer, TURNS, "f:1")
    assert trained_spans(tokenizer, ids, mask) == ["yo<|end|>", "so long<|end|>"]
    assert ids == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)


def test_a_prompt_is_a_prefix_of_its_conversation() -> None:
    """Goal: what RL samples from is what SFT trained on. Red without add_generation_prompt."""
    tokenizer = tiny_tokenizer()
    ids, mask = render_conversation(tokenizer, TURNS[:3], "f:1")
    prompt = render_prompt(tokenizer, {"messages": TURNS[:2]})
    assert prompt == ids[: len(prompt)] and mask.index(1.0) == len(prompt)


def test_a_bare_string_is_a_user_message() -> None:
    """Goal: DataBuffer(prompts=["What is 2+2?"]) works. Red when it needed a row."""
    tokenizer = tiny_tokenizer()
    assert render_prompt(tokenizer, "hi") == render_prompt(tokenizer, {"messages": [{"role": "user", "content": "hi"}]})


def test_no_assistant_turn_gives_an_empty_mask() -> None:
    """Goal: the caller decides (it counts and reports such rows). Red when runs of an all-zero mask gave a span."""
    for template in (None, CHATML):
        assert not any(render_conversation(tiny_tokenizer(template), TURNS[:2], "f:1")[1])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRIPS_EARLIER_TURNS, r"f:1: messages\[2\]: the chat template renders the beginning"),
        (NO_END, "f:1: the chat template ends an assistant turn without a special token"),
        (REFUSES_SYSTEM, "f:1: the chat template refuses these messages .*no system role"),
    ],
)
def test_a_template_that_cannot_be_masked_is_an_error_with_the_row(template: str, message: str) -> None:
    """Goal: never a wrong mask. Red: without the nesting check the first one trained half a user turn."""
    with pytest.raises(DataError, match=message):
        render_conversation(tiny_tokenizer(template), TURNS, "f:1")


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    """Goal: a base model's tokenizer says what it lacks. Red when ValueError without the name came through."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"tokenizer '.*tiny_qwen2' has no chat template"):
        render_prompt(tokenizer, "hi")
