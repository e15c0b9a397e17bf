"""Chat-template families for tests: the templates in templates/, and a small fast tokenizer with each one's tokens.

Byte-level (GPT-2's alphabet) or character-level with byte fallback (SentencePiece's kind); a few merges, so that tokens
can stand across what belongs to different speakers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("h", "i"), (":", "Ġ")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluates an expression.",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]


@dataclass(frozen=True)
class Family:
    """What one family of templates has, and how it writes what the assistant says (end-of-turn token and all)."""

    name: str
    specials: tuple[str, ...]
    end: str
    spoken: Callable[[dict[str, Any]], str]
    added: tuple[str, ...] = ()  # tokens that are not special
    bos: str | None = None
    system: bool = True
    tools: bool = False
    calls_with_text: bool = True  # a call may follow text in one message
    thinking: bool = False
    kind: str = "byte"

    def tokenizer(self) -> Any:
        return family_tokenizer(self.name)


def _call_json(message: dict[str, Any], key: str = "arguments") -> list[str]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [
        f'{{"name": "{one["name"]}", "{key}": {json.dumps(one["arguments"], ensure_ascii=False)}}}'
        for one in functions
    ]


def _qwen2_5(message: dict[str, Any]) -> str:
    calls = [f"<tool_call>\n{call}\n</tool_call>" for call in _call_json(message)]
    return "\n".join([part for part in [message.get("content", "")] if part] + calls) + "<|im_end|>"


def _qwen3(message: dict[str, Any]) -> str:
    return f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n" + _qwen2_5(message)


def _llama3(message: dict[str, Any]) -> str:
    return (_call_json(message, "parameters") or [message["content"]])[0] + "<|eot_id|>"


def _mistral(message: dict[str, Any]) -> str:
    calls = _call_json(message)
    return (f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else " " + message["content"]) + "</s>"


def _marked(message: dict[str, Any]) -> str:
    calls = [f"<tool_call>{call}</tool_call>" for call in _call_json(message)]
    return message.get("content", "") + "".join(calls) + "<|im_end|>"


def _marked_thinking(message: dict[str, Any]) -> str:
    thinking = message.get("reasoning_content")
    return (f"<think>{thinking}</think>" if thinking else "") + message["content"] + "<|im_end|>"


def _gemma(message: dict[str, Any]) -> str:
    return message["content"] + "<end_of_turn>"


LLAMA = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
)
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
MISTRAL = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
)
MISTRAL_RESULTS = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_5", CHATML, "<|im_end|>", _qwen2_5, QWEN_ADDED, tools=True),
        Family("qwen3", CHATML, "<|im_end|>", _qwen3, QWEN_ADDED, tools=True, thinking=True),
        Family(
            "llama3",
            LLAMA,
            "<|eot_id|>",
            _llama3,
            bos=LLAMA[0],
            tools=True,
            calls_with_text=False,
            kind="trimmed",
        ),
        Family("gemma3", GEMMA, "<end_of_turn>", _gemma, bos="<bos>", kind="pieces"),
        Family("gemma2", GEMMA, "<end_of_turn>", _gemma, bos="<bos>", system=False, kind="pieces"),
        Family(
            "mistral",
            MISTRAL + MISTRAL_RESULTS,
            "</s>",
            _mistral,
            bos="<s>",
            tools=True,
            calls_with_text=False,
            kind="metaspace",
        ),
        Family("smollm", CHATML, "<|im_end|>", _marked_thinking),
        Family("marked", CHATML, "<|im_end|>", _marked, QWEN_ADDED, tools=True),
        Family("marked_thinking", CHATML, "<|im_end|>", _marked_thinking, thinking=True),
    )
}


@cache
def family_tokenizer(name: str) -> Any:
    """The family's template on a tokenizer whose pad token is its end-of-turn token, on purpose (trl#3091)."""
    family = FAMILIES[name]
    tokenizer = (
        byte_level(family.kind == "trimmed")
        if family.kind in ("byte", "trimmed")
        else _pieces(family.kind)
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in family.specials]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in family.added]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.end,
        pad_token=family.end,
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
    )


def byte_level(trim_offsets: bool) -> Tokenizer:
    """As GPT-2's, Qwen's, Llama 3's; the last of these leaves white space out of its offsets."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, merges=MERGES)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def _pieces(kind: str) -> Tokenizer:
    """As Gemma's and Mistral's: characters, "▁" for a space, bytes for what has no character."""
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "hi",
        "▁▁",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges=[("h", "i"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
