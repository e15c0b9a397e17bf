"""SFT samples out of conversations that a chat template splits, and what the report says about them."""

import pytest

from rollouts.data_formats import parse_row
from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError, Row
from rollouts.training.datasets import sft
from rollouts.training.datasets.sft import build_sft_samples
from tests.training.datasets.families import FAMILIES, TOOLS
from tests.training.datasets.test_chat_families import CHAT, TOOL_CHAT

THOUGHTS = [
    CHAT[0],
    {**CHAT[1], "reasoning_content": "greet"},
    CHAT[2],
    {**CHAT[3], "reasoning_content": "leave"},
]


def example(messages: list[dict], number: int = 1, **columns: object) -> Example:
    return parse_row(Row(f"f.jsonl:{number}", {"messages": messages, **columns}), "messages")


def test_a_split_conversation_gives_a_sample_a_turn_and_is_reported() -> None:
    """Goal: nothing trained twice, nothing lost, and the report says how many became how many.

    Red with the first rendering alone kept, and with `split` not counted.
    """
    tokenizer = FAMILIES["qwen3"].tokenizer()
    samples, report = build_sft_samples(
        [example(THOUGHTS), example(CHAT[:2], 2)], tokenizer, max_length=-1
    )
    assert [sample.metadata for sample in samples] == [
        {"where": "f.jsonl:1", "turns": [1]},
        {"where": "f.jsonl:1", "turns": [3]},
        {"where": "f.jsonl:2", "turns": [1]},
    ]
    trained = [
        tokenizer.decode(
            [token for token, mask in zip(one.tokens, one.loss_mask, strict=True) if mask]
        )
        for one in samples
    ]
    assert trained == [
        "<think>\ngreet\n</think>\n\nyo<|im_end|>",
        "<think>\nleave\n</think>\n\nso long<|im_end|>",
        "<think>\n\n</think>\n\nyo<|im_end|>",
    ]
    assert [sample.response for sample in samples] == ["yo", "so long", "yo"]
    assert [len(sample.prompt["messages"]) for sample in samples] == [1, 3, 1]
    assert (report.kept, report.split, report.split_samples) == (3, 1, 2)
    assert report.trained_tokens == sum(sum(sample.loss_mask) for sample in samples)
    assert "; 1 conversations became 2: the template renders earlier turns anew" in str(report)


def test_a_piece_that_is_too_long_leaves_the_others() -> None:
    """Goal: the limit counts what is trained on, a sample; the rest is named. Red with the example left out whole."""
    tokenizer = FAMILIES["qwen3"].tokenizer()
    whole, _ = build_sft_samples([example(THOUGHTS)], tokenizer, max_length=-1)
    samples, report = build_sft_samples(
        [example(THOUGHTS)], tokenizer, max_length=len(whole[0].tokens)
    )
    assert samples == whole[:1]
    assert list(report.left_out.values()) == [1] and report.kept == 1
    with pytest.raises(DataError, match="no example is left to train on: 0 examples"):
        build_sft_samples([example(THOUGHTS)], tokenizer, max_length=1)


def test_tools_come_from_the_rows_column() -> None:
    """Goal: the "tools" column reaches the template, in SFT as in the prompt. Red when it was not handed on."""
    tokenizer = FAMILIES["llama3"].tokenizer()
    (sample,), _ = build_sft_samples([example(TOOL_CHAT, tools=TOOLS)], tokenizer, max_length=-1)
    assert sample.tokens == tokenizer.apply_chat_template(TOOL_CHAT, tools=TOOLS, return_dict=False)


def test_more_rows_than_are_rendered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: all rows, in order, and read lazily. Red when the last, smaller chunk was dropped."""
    monkeypatch.setattr(sft, "EXAMPLES_PER_CALL", 3)
    rows = [
        example([CHAT[0], {"role": "assistant", "content": "x" * (n + 1)}], n) for n in range(7)
    ]
    samples, report = build_sft_samples(iter(rows), FAMILIES["smollm"].tokenizer(), max_length=-1)
    assert [len(sample.response) for sample in samples] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ] and report.kept == 7
