"""Token ids and masks out of chat templates of several kinds, checked against what the ids decode to.

The families of templates that models ship with: test_chat_families.py.
"""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import Rendering, render_conversation, render_prompt
from tests.training.tiny_task import tiny_tokenizer

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
BAD_CALL = {"type": "function", "function": {"name": "add", "arguments": "1+"}}
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
CHANGES_WITH_THE_TURN = (  # says how many messages there are
    "{{ messages | length }}" + CHATML
)
WRITES_NOTHING = (
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
MARKS_NOTHING = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
MARKS_MOVE = "{{ '.' * (messages | length) }}" + MARKED_BEYOND_END
HEADER_RUNS_ON = (  # its last letter and the answer's first are one token: see `merging_tokenizer`
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
STRIPS_EARLIER_TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content[:1] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)


def trained_spans(tokenizer: Any, rendering: Rendering) -> list[str]:
    """The trained stretches of text, special tokens and all."""
    ids, mask = rendering.token_ids, rendering.mask
    assert len(ids) == len(mask) and set(mask) <= {0.0, 1.0}
    spans: list[list[int]] = []
    for position, (token, value) in enumerate(zip(ids, mask, strict=True)):
        if value and (position == 0 or not mask[position - 1]):
            spans.append([])
        if value:
            spans[-1].append(token)
    return [tokenizer.decode(span) for span in spans]


def render_whole(tokenizer: Any, messages: list[dict[str, Any]]) -> Rendering:
    """The only rendering of a conversation whose prefixes nest."""
    (rendering,) = render_conversation(tokenizer, messages, "f:1")
    return rendering


def merging_tokenizer(template: str) -> Any:
    """One token for ":yo" and for a double line break."""
    vocabulary = {
        token: index
        for index, token in enumerate([*sorted(ByteLevel.alphabet()), "yo", ":yo", "ĊĊ"])
    }
    merges = [("y", "o"), (":", "yo"), ("Ċ", "Ċ")]
    tokenizer = Tokenizer(BPE(vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template
    )


@pytest.mark.parametrize(
    "template",
    [None, CHATML, MARKED_WITHOUT_END, MARKED_BEYOND_END, NO_GENERATION_PROMPT],
    ids=[
        "shipped",
        "chatml",
        "markers before the end token",
        "markers beyond it",
        "no generation prompt",
    ],
)
def test_the_assistants_text_and_its_end_are_trained_and_nothing_else(template: str | None) -> None:
    """Goal: verl#3562, trl#5988, Megatron-Bridge#3359: every kind of template trains text and end token alone.

    Red for chatml and "beyond" when the newline after the end token was trained (or the next turn's first token), for
    "before" when only the marked span was.
    """
    tokenizer = tiny_tokenizer(template)
    rendering = render_whole(tokenizer, TURNS)
    assert trained_spans(tokenizer, rendering) == ["yo<|end|>", "so long<|end|>"]
    assert rendering.turns == (2, 4)
    assert rendering.token_ids == tokenizer.apply_chat_template(
        TURNS, tokenize=True, return_dict=False
    )


def test_a_prompt_is_a_prefix_of_its_conversation() -> None:
    """Goal: what RL samples from is what SFT trained on. Red without add_generation_prompt."""
    tokenizer = tiny_tokenizer()
    rendering = render_whole(tokenizer, TURNS[:3])
    prompt = render_prompt(tokenizer, {"messages": TURNS[:2]})
    assert prompt == rendering.token_ids[: len(prompt)] and rendering.mask.index(1.0) == len(prompt)


def test_a_bare_string_is_a_user_message() -> None:
    """Goal: DataBuffer(prompts=["What is 2+2?"]) works. Red when it needed a row."""
    tokenizer = tiny_tokenizer()
    assert render_prompt(tokenizer, "hi") == render_prompt(
        tokenizer, {"messages": [{"role": "user", "content": "hi"}]}
    )


def test_no_assistant_turn_gives_an_empty_mask() -> None:
    """Goal: the caller decides (it counts and reports such rows). Red when runs of an all-zero mask gave a span."""
    for template in (None, CHATML):
        rendering = render_whole(tiny_tokenizer(template), TURNS[:2])
        assert not any(rendering.mask) and rendering.turns == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHANGES_WITH_THE_TURN,
            r"f:1: messages\[2\]: the chat template renders the text before this turn diff",
        ),
        (
            MARKS_MOVE,
            r"f:1: messages\[4\]: the chat template renders the text before this turn differently",
        ),
        (
            WRITES_NOTHING,
            r"f:1: messages\[2\]: the chat template renders nothing for this assistant message, so",
        ),
        (
            MARKS_NOTHING,
            r"f:1: messages\[2\]: .*nothing for this assistant message between \{% generation %\}",
        ),
        (
            HEADER_RUNS_ON,
            r"f:1: the tokenizer makes one token of the end of the assistant's header and 'yo",
        ),
        (NO_END, "f:1: the chat template ends an assistant turn without a special token"),
        (REFUSES_SYSTEM, "f:1: the chat template refuses these messages .*no system role"),
    ],
)
def test_a_template_that_cannot_be_masked_is_an_error_with_the_row(
    template: str, message: str
) -> None:
    """Goal: never a wrong mask, all zeros or all ones among them (Megatron-Bridge#3359).

    Red: without the nesting check the first one trained half a user turn; "writes nothing" and "marks nothing" came
    back with an all-zero mask without theirs; in "runs on" the answer's first letter was not trained.
    """
    tokenizer = (
        merging_tokenizer(template) if template == HEADER_RUNS_ON else tiny_tokenizer(template)
    )
    with pytest.raises(DataError, match=message):
        render_conversation(tokenizer, TURNS, "f:1")


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    """Goal: a base model's tokenizer says what it lacks. Red when ValueError without the name came through."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"tokenizer '.*tiny_qwen2' has no chat template"):
        render_prompt(tokenizer, "hi")


def test_a_conversation_whose_earlier_turns_change_is_split() -> None:
    """Goal: traps.md, prefixes that do not nest: each turn is trained once, in the text in which it was spoken.

    Red with one rendering for all: the first answer was trained as the "y" that the template leaves of it.
    """
    tokenizer = tiny_tokenizer(STRIPS_EARLIER_TURNS)
    first, second = render_conversation(tokenizer, TURNS, "f:1")
    assert [rendering.turns for rendering in (first, second)] == [(2,), (4,)]
    assert trained_spans(tokenizer, first) == ["yo<|end|>"]
    assert trained_spans(tokenizer, second) == ["so long<|end|>"]
    assert "<|assistant|>y<|end|>" in tokenizer.decode(second.token_ids)
    for rendering, count in ((first, 3), (second, 5)):
        assert rendering.token_ids == tokenizer.apply_chat_template(
            TURNS[:count], return_dict=False
        )


def test_what_follows_the_last_turn_may_change_it() -> None:
    """Goal: a conversation that ends with the user trains its answers too. Red when its own text was taken for all."""
    tokenizer = tiny_tokenizer(STRIPS_EARLIER_TURNS)
    (rendering,) = render_conversation(tokenizer, TURNS[:4], "f:1")
    assert trained_spans(tokenizer, rendering) == ["yo<|end|>"] and rendering.turns == (2,)
    whole = render_whole(tiny_tokenizer(CHATML), TURNS[:4])
    assert tiny_tokenizer(CHATML).decode(whole.token_ids).endswith("bye<|end|>\n")


def test_white_space_that_merges_with_the_header_belongs_to_the_prompt() -> None:
    """Goal: an answer that opens with a line break is trained without it, token-exactly, not an error for the data set.

    Red: the prompt's tokens are no prefix of the conversation's, which was an error.
    """
    tokenizer = merging_tokenizer(
        CHATML.replace("<|assistant|>", "<|assistant|>\n").replace("'|>'", "'|>\n'")
    )
    messages = [TURNS[1], {"role": "assistant", "content": "\nyo"}]
    rendering = render_whole(tokenizer, messages)
    assert trained_spans(tokenizer, rendering) == ["yo<|end|>"]
    assert rendering.token_ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_tokenizer_without_offsets_gives_the_same_mask() -> None:
    """Goal: tokenizers written in Python work. Red without their own way: they raise NotImplementedError."""
    tokenizer = ByT5Tokenizer(extra_ids=0, chat_template=CHATML.replace("<|end|>", "</s>"))
    assert not tokenizer.is_fast
    rendering = render_whole(
        tokenizer, [*TURNS[:2], {"role": "assistant", "content": "né 🙂"}, *TURNS[3:]]
    )
    assert trained_spans(tokenizer, rendering) == ["né 🙂</s>", "so long</s>"]


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (
            [TURNS[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            None,
            "leaves out tool_calls",
        ),
        (
            [TURNS[1], {"role": "assistant", "content": "2", "thinking": "1+1"}],
            None,
            "leaves out thinking",
        ),
        (
            TURNS,
            [{"type": "function", "function": {"name": "add"}}],
            "f:1: the chat template leaves out the tool 'add'",
        ),
        (TURNS, "[1]", r"f:1: tools='\[1\]'; needs a list of JSON schemas"),
        (
            [TURNS[1], {"role": "assistant", "tool_calls": ["add"]}],
            None,
            r"messages\[1\].tool_calls has 'add'; needs",
        ),
        (
            [{**TURNS[2], "tool_calls": [BAD_CALL]}],
            None,
            r"messages\[0\].tool_calls: arguments='1\+'; needs an object",
        ),
    ],
)
def test_what_the_template_would_drop_without_a_word_is_an_error(
    messages: Any, tools: Any, message: str
) -> None:
    """Goal: nothing is lost between the row and the tokens. Red: a template without tools trained an empty answer."""
    with pytest.raises(DataError, match=message):
        render_conversation(tiny_tokenizer(CHATML), messages, "f:1", tools=tools)


def test_dropped_messages_are_an_error() -> None:
    """Goal: a template that ignores the system message says so. Red without the check of the context."""
    ignores_system = CHATML.replace("{{", "{% if m.role != 'system' %}{{", 1).replace(
        "}}", "}}{% endif %}", 1
    )
    with pytest.raises(
        DataError, match=r"f:1: messages\[0\]: the chat template leaves out content of the system"
    ):
        render_conversation(tiny_tokenizer(ignores_system), TURNS, "f:1")


@pytest.mark.parametrize("marks", [False, True])
def test_an_answer_may_leave_the_generation_prompt_early(marks: bool) -> None:
    """Goal: a prompt that opens a thought, as DeepSeek's and Nemotron's, and an answer without one; also marked.

    Red without the shared header: refused, and where markers take in the header, "<|assistant|>" was trained.
    """
    spoken = "'<|assistant|>' + m.content + '<|end|>'"
    turn = (
        f"{{% generation %}}{{{{ {spoken} }}}}{{% endgeneration %}}"
        if marks
        else f"{{{{ {spoken} }}}}"
    )
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + turn
        + "{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    rendering = render_whole(tokenizer, TURNS)
    assert trained_spans(tokenizer, rendering) == ["yo<|end|>", "so long<|end|>"]
    thought = [TURNS[1], {"role": "assistant", "content": "<think>\nhm</think>yo"}]
    assert trained_spans(tokenizer, render_whole(tokenizer, thought)) == ["hm</think>yo<|end|>"]
