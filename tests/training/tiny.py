"""Real but tiny: a Qwen2 from a config, a tokenizer of letters, samples and rollouts drawn from a seed."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.optim import build_optimizer
from rollouts.training.rl_losses import sft_loss
from rollouts.training.types import RolloutBatch, Sample

VOCAB = 24
EOS = 1
PAD = EOS  # on purpose: padding must follow from lengths, never from the token id


def tiny_model(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, tied: bool = True
) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<eos>": EOS, **{chr(ord("a") + i): i + 2 for i in range(VOCAB - 2)}}
    model = tokenizers.models.WordLevel(vocab=vocab, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", unk_token="<unk>"
    )


def tiny_backend(
    checkpoint_dir: Path,
    *,
    loss_fn: Callable[..., torch.Tensor] = sft_loss,
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-2,
    max_grad_norm: float = math.inf,
    seed: int = 0,
    **options: Any,
) -> PyTorchTrainingBackend:
    model = options.pop("model", None) or tiny_model(seed, dtype=dtype)
    optimizer = options.pop("optimizer", None) or build_optimizer(
        model,
        matrix_lr=lr,
        embedding_lr=lr / 2,
        unembedding_lr=lr,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
    )
    return PyTorchTrainingBackend(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        checkpoint_dir=checkpoint_dir,
        device="cpu",
        max_grad_norm=max_grad_norm,
        **{"tokenizer": tiny_tokenizer(), **options},
    )


def sft_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of 2 to 5 tokens and responses of 1 to 6 that end in EOS, only those trained on."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(2, 5))]
        response = [*(rng.randrange(2, VOCAB) for _ in range(rng.randint(0, 5))), EOS]
        mask = [0.0] * len(prompt) + [1.0] * len(response)
        samples.append(
            Sample(
                prompt="p", tokens=prompt + response, loss_mask=mask, response_length=len(response)
            )
        )
    return samples


def rollout_batch(groups: int, group_size: int, seed: int = 0) -> RolloutBatch:
    """Scored groups as a rollout manager gives them, with made-up log-probs of the sampler."""
    rng = random.Random(seed)
    samples = sft_samples(groups * group_size, seed)
    for sample in samples:
        sample.reward = float(rng.random() < 0.5)
        sample.rollout_log_probs = [rng.uniform(-4.0, -2.0) for _ in range(sample.response_length)]
        sample.metadata = {"weight_version": "0", "finish_reason": {"type": "stop", "matched": EOS}}
    return RolloutBatch(
        tokens=[sample.tokens for sample in samples],
        loss_masks=[sample.loss_mask for sample in samples],
        rewards=[sample.reward or 0.0 for sample in samples],
        response_lengths=[sample.response_length for sample in samples],
        metadata={"groups_kept": groups, "groups_dropped": 0},
        samples=samples,
        group_ids=[index // group_size for index in range(len(samples))],
    )
