"""Write configs/models/tiny_qwen2/: the architecture, tokenizer and chat template of the offline demo, as text.

No weights: the worker draws them from `model.init_seed`. Run from the repository's root, then commit what changed:

    python scripts/make_tiny_model.py
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TARGET = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_qwen2"
PAD, END, USER, ASSISTANT, SYSTEM = SPECIALS = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)

# The end-of-turn token is inside {% generation %}: stopping is trained.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- message['content'] + '<|end|>' -}}
{%- endgeneration -%}
{%- elif message['role'] in ['system', 'user'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- raise_exception('role ' + message['role'] + ' is not system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """Build a tokenizer of one token per byte, after the specials: byte-level BPE without a merge, for any text.

    It is BPE because transformers rebuilds the tokenizer of every model of type qwen2 as Qwen2Tokenizer, which is
    byte-level BPE over this file's vocabulary; another kind of tokenizer would silently become something else.
    """
    vocabulary = {
        token: index
        for index, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    return tokenizer


def model_config(vocab_size: int) -> dict[str, object]:
    """Return Qwen2 with 2 layers of width 64, about 0.17M parameters. Ids follow SPECIALS."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10.0,  # positions here are few: with 10,000 some seeds take twice as long to find them
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "pad_token_id": SPECIALS.index(PAD),
        "eos_token_id": SPECIALS.index(END),
        "bos_token_id": None,
        "dtype": "float32",
    }


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": PAD,  # every byte has an id; left out, Qwen2Tokenizer would append its own token
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 256,
    }


def main() -> int:
    TARGET.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(TARGET / "tokenizer.json"), pretty=True)
    for name, content in (
        ("config.json", model_config(tokenizer.get_vocab_size())),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (TARGET / name).write_text(json.dumps(content, indent=2) + "\n")
    (TARGET / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
