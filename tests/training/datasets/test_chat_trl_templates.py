"""The templates that models really ship, as TRL (in the dev extra) carries them: none gives a wrong mask in silence."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import render_conversation
from tests.training.datasets.families import byte_level
from tests.training.datasets.test_chat import trained_spans
from tests.training.datasets.test_chat_families import CHAT, TOOL_CHAT, TOOLS

FOUND = find_spec("trl")
if FOUND is None or FOUND.origin is None:
    pytest.skip("trl is not installed", allow_module_level=True)
IMAGES = re.compile("idefics|llava|smolvlm")  # their content is a list of parts
TEMPLATES = [
    path
    for path in sorted((Path(FOUND.origin).parent / "chat_templates").glob("*.jinja"))
    if not IMAGES.match(path.name)
]
TOKEN = re.compile(r"<\|[^|<>{}\s']+\|>|<\|?[a-z_]+\|?>|</[a-z_]+>|<｜[^｜]+｜>|\[/?[A-Z_]+\]")
THOUGHTS = [
    CHAT[0],
    {**CHAT[1], "reasoning_content": "greet"},
    CHAT[2],
    {**CHAT[3], "reasoning_content": "leave"},
]


def tokenizer_for(template: str) -> Any:
    """One token for everything in the template that looks like a special token."""
    tokens = sorted(set(TOKEN.findall(template)))
    tokenizer = byte_level(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=template
    )


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_each_turn_is_trained_once_and_all_of_it_or_refused(path: Path) -> None:
    """Goal: for chats, thoughts and tools alike, what is trained is what the assistant says, with an end.

    A template may refuse what it cannot render; only the end of a turn (glm4moe has none) makes it refuse a plain chat.
    Red with the rendering without a generation prompt taken for a turn's beginning (headers were trained; phi3, which
    ends it with an end of text, was refused), and for qwen2_5_training with the markers uncut (they take in the
    header's line break).
    """
    tokenizer = tokenizer_for(path.read_text(encoding="utf-8"))
    for messages, tools in ((CHAT, None), (THOUGHTS, None), (TOOL_CHAT, TOOLS)):
        try:
            renderings = render_conversation(tokenizer, messages, "f:1", tools=tools)
        except DataError as error:
            assert messages is not CHAT or (
                path.stem == "glm4moe" and "without a special token" in str(error)
            )
            continue
        # GLM's has no line break
        headers = "<|im_start|>", "<｜Assistant｜>", *(["\n"] if "glm" not in path.stem else [])
        turns = [turn for rendering in renderings for turn in rendering.turns]
        assert turns == [1, 3]
        for rendering in renderings:
            spans = trained_spans(tokenizer, rendering)
            text = "".join(spans)
            for index, message in enumerate(messages):
                parts = [message.get("content"), message.get("reasoning_content")]
                parts += [call["function"]["name"] for call in message.get("tool_calls", ())]
                for part in filter(None, parts):
                    assert (part in text) == (index in rendering.turns), (part, spans)
            assert len(spans) >= len(rendering.turns) and not text.startswith(headers)
            specials = {
                index for index, token in tokenizer.added_tokens_decoder.items() if token.special
            }
            assert all(rendering.token_ids[end] in specials for end in ends(rendering.mask))
            last = rendering.turns[-1] + 1 if rendering is not renderings[-1] else len(messages)
            assert rendering.token_ids == tokenizer.apply_chat_template(
                messages[:last], tools=tools, return_dict=False
            )


def ends(mask: list[float]) -> list[int]:
    """The last position of each trained stretch."""
    return [i for i, value in enumerate(mask) if value and (i + 1 == len(mask) or not mask[i + 1])]
