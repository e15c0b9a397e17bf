"""SFT of a 0.6B model of Qwen3's shape, packed, bf16 over fp32 master weights: tokens/s, MFU, peak memory, loss.

What scripts/gpu_check measures on a CUDA card. MFU is counted as in `rollouts.training.flops`, against the rate of a
large bf16 matrix product measured on the same card just before, and against what the maker states.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.compiled_layers import compile_layers
from rollouts.training.flops import attended_length, flops_per_token
from rollouts.training.loops.batching import collate
from rollouts.training.loops.train_step import train_step
from rollouts.training.optim import build_optimizer
from rollouts.training.rl_losses import sft_loss

WARMUP_STEPS = 3  # compilation, allocator, clocks


@dataclass(frozen=True)
class Speed:
    """Of training steps alone, after warm-up; `memory_bytes` is the most that torch held (0 on a CPU)."""

    micro_batch_tokens: int
    compiled: bool
    tokens_per_s: float
    flops_per_s: float
    memory_bytes: int
    losses: tuple[float, ...]


def qwen3_600m() -> Qwen3Config:
    """The shape of Qwen3-0.6B."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )


def matmul_flops_per_s(device: str, size: int = 8192, repeats: int = 20) -> float:
    """The rate of a bf16 product of two [size, size] matrices, the best of `repeats`."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = _now(device)
        left @ right
        seconds.append(_now(device) - started)
    return 2 * size**3 / min(seconds)


def measure(
    config: Any,
    *,
    device: str,
    micro_batch_tokens: int,
    directory: Path,
    compiled: bool,
    steps: int = 10,
) -> Speed:
    """`steps` optimizer steps of four micro-batches each, full of documents of 32 tokens up to a quarter of one."""
    backend = make_backend(config, device, directory, compiled=compiled)
    rng = random.Random(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, lengths = [], 0.0, []
    for step in range(WARMUP_STEPS + steps):
        documents = make_documents(
            rng, 4 * micro_batch_tokens, micro_batch_tokens // 4, config.vocab_size
        )
        started = _now(device)
        batch = collate(documents, [[1.0] * len(row) for row in documents], pad_token_id=0)
        losses.append(anyio.run(train_step, backend, batch, None, micro_batch_tokens)["loss"])
        if step >= WARMUP_STEPS:
            seconds += _now(device) - started
            lengths += [len(row) for row in documents]
    rate = sum(lengths) / seconds
    return Speed(
        micro_batch_tokens=micro_batch_tokens,
        compiled=compiled,
        tokens_per_s=rate,
        flops_per_s=rate * flops_per_token(config, attended_length(lengths)),
        memory_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        losses=tuple(losses),
    )


def make_backend(
    config: Any,
    device: str,
    directory: Path,
    *,
    compiled: bool = False,
    compute_dtype: str = "bfloat16",
) -> PyTorchTrainingBackend:
    """Weights drawn on the CPU from one seed, so that every device starts from the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    if compiled:
        compile_layers(model)
    rates = {"matrix_lr": 1e-4, "embedding_lr": 1e-4, "unembedding_lr": 1e-4}
    return PyTorchTrainingBackend(
        model=model,
        optimizer=build_optimizer(
            model, **rates, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8
        ),
        loss_fn=sft_loss,
        checkpoint_dir=directory,
        device=device,
        compute_dtype=compute_dtype,
    )


def make_documents(
    rng: random.Random, tokens: int, longest: int, vocabulary: int
) -> list[list[int]]:
    """Documents of log-normal length, `tokens` in all."""
    documents = []
    while tokens >= 2:
        length = min(tokens, longest, max(32, round(rng.lognormvariate(6.5, 0.8))))
        documents.append([rng.randrange(vocabulary) for _ in range(length)])
        tokens -= length
    return documents


def losses_on_both(
    config: Any, *, device: str, directory: Path, tokens: int = 1024
) -> tuple[float, float]:
    """The loss of the same weights on the same documents: on the CPU in fp32, and on `device` in bf16."""
    documents = make_documents(random.Random(1), tokens, tokens // 2, config.vocab_size)
    batch = collate(documents, [[1.0] * len(row) for row in documents], pad_token_id=0)

    def loss_on(place: str, dtype: str) -> float:
        backend = make_backend(config, place, directory, compute_dtype=dtype)
        return anyio.run(backend.forward(batch).result)["loss"]

    return loss_on("cpu", "float32"), loss_on(device, "bfloat16")


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
