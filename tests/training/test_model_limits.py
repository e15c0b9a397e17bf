"""Rows beyond a model's embeddings or learned positions are named before the first step."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from rollouts.data_formats.row import DataError
from rollouts.training import SFTTrainingConfig, run_sft_training
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.evaluation import evaluate_with_model
from rollouts.training.loops import validation_losses
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.model_limits import ModelLimits, limits_of, require_fit
from rollouts.training.rl_losses import sft_loss
from rollouts.training.types import Sample
from tests.training.tiny_task import tiny_model, tiny_tokenizer

POSITIONS = 24
GPT2 = GPT2Config(
    vocab_size=261, n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS, eos_token_id=1
)
OPT = OPTConfig(
    vocab_size=261,
    hidden_size=16,
    ffn_dim=16,
    word_embed_proj_dim=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=POSITIONS,
    eos_token_id=1,
)


def sample(*tokens: int, where: str = "f.jsonl:7") -> Sample:
    ids = list(tokens)
    return Sample(
        prompt="p", tokens=ids, loss_mask=[0.0] + [1.0] * (len(ids) - 1), metadata={"where": where}
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tiny_model(), ModelLimits(261, None)),
        (AutoModelForCausalLM.from_config(GPT2), ModelLimits(261, POSITIONS)),
        (AutoModelForCausalLM.from_config(OPT), ModelLimits(261, POSITIONS)),
        (torch.nn.Module(), ModelLimits(None, None)),
        (torch.nn.Linear(2, 2), ModelLimits(None, None)),
    ],
    ids=["Qwen2", "GPT-2", "OPT", "no module", "no embedding"],
)
def test_limits_are_those_of_the_models_tables(model: Any, expected: ModelLimits) -> None:
    """Goal: rotary positions have no end, learned ones have, spare rows apart. Red with OPT's two counted."""
    assert limits_of(model) == expected


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [1, 2, 261],
            r"f.jsonl:7 has the token id 261, .*embedding has 261 rows \(ids 0 to 260\). Fix: the tokenizer",
        ),
        (
            [5] * (POSITIONS + 1),
            f"f.jsonl:7 has {POSITIONS + 1} tokens, and the model has {POSITIONS} learned positions",
        ),
    ],
)
def test_a_row_beyond_them_is_named_before_the_first_step(
    tmp_path: Path, tokens: list[int], message: str
) -> None:
    """Goal: numbers, row and fix. Red: IndexError: index out of range in self (a device assert on CUDA)."""
    model = AutoModelForCausalLM.from_config(GPT2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backend = PyTorchTrainingBackend(
        model, optimizer, loss_fn=sft_loss, checkpoint_dir=tmp_path, device=torch.device("cpu")
    )
    samples = [
        sample(1, 2, where="f.jsonl:1"),
        sample(*tokens),
        sample(*[5] * POSITIONS, where="f.jsonl:9"),
    ]
    with pytest.raises(DataError, match=message):
        anyio.run(run_sft_training, backend, samples, SFTTrainingConfig(num_steps=1, batch_size=1))
    with pytest.raises(DataError, match=message):
        anyio.run(lambda: validation_losses(backend, samples, batch_size=1))
    apply_lora(model, LoraSettings(2, 2.0, 0.0, ["c_attn"], 0), base_name="x")
    with pytest.raises(DataError, match=message):
        require_fit(model, samples)


def test_an_answer_in_process_ends_where_the_positions_do() -> None:
    """Goal: evaluation of a model with few positions gives what fits; a prompt that leaves no room is named. Red:
    IndexError."""
    model, tokenizer = AutoModelForCausalLM.from_config(GPT2), tiny_tokenizer()
    rows = [{"messages": [{"role": "user", "content": "a" * (POSITIONS - 6)}], "answer": "x"}]
    found = evaluate_with_model(model, tokenizer, rows, max_new_tokens=100, stop_token_ids=[260])
    assert len(found.responses) == 1
    rows = [{"messages": [{"role": "user", "content": "a" * POSITIONS}], "answer": "x"}]
    with pytest.raises(
        DataError, match=f"a prompt and the first token of its answer has {POSITIONS + 4} tokens"
    ):
        evaluate_with_model(model, tokenizer, rows, max_new_tokens=100)
