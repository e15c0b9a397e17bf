"""scripts/gpu_check where there is no GPU: its refusal, and its measurements run through on a tiny model on the CPU."""

import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.gpu_sft import (
    losses_on_both,
    make_documents,
    matmul_flops_per_s,
    measure,
    qwen3_600m,
)
from scripts.gpu_check import problems, record

ROOT = Path(__file__).resolve().parent.parent


def tiny_qwen3() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="has an NVIDIA driver")
def test_without_a_driver_it_ends_at_once() -> None:
    """Goal: a clear error and exit 2, before anything is installed. Red without the check: it made a .venv."""
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "error: no NVIDIA GPU on this machine" in done.stderr and "fix" in done.stderr


def test_without_a_cuda_device_it_ends_with_two() -> None:
    """Goal: the same for a card that torch cannot use. Red with the exit code 1."""
    before = (ROOT / "docs" / "benchmarks.md").read_text()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_check.py"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 2
    assert "finds no CUDA device; nothing was run" in done.stderr
    assert (ROOT / "docs" / "benchmarks.md").read_text() == before


def test_the_measurement_runs_through_and_is_recorded(tmp_path: Path) -> None:
    """Goal: what a GPU host runs works here on a tiny model: packed bf16 steps, both losses, the record.

    Red with the tokens of the warm-up steps counted too: their seconds are not.
    """
    config = tiny_qwen3()
    speed = measure(
        config, device="cpu", micro_batch_tokens=128, directory=tmp_path, compiled=False, steps=2
    )
    assert len(speed.losses) == 5 and all(map(math.isfinite, speed.losses))
    assert speed.losses[0] == pytest.approx(math.log(96), rel=0.1)
    assert speed.flops_per_s > speed.tokens_per_s > 0
    losses = losses_on_both(config, device="cpu", directory=tmp_path, tokens=128)
    assert losses[0] != losses[1] and problems([speed], losses) == []
    rate = matmul_flops_per_s("cpu", size=64, repeats=2)
    text = record(
        command="scripts/gpu_check",
        card="NVIDIA H200",
        versions="torch 2.13.0",
        commit="abc",
        date="2026-01-01",
        matmul=rate,
        speeds=[speed],
        losses=losses,
    )
    assert "### NVIDIA H200, 2026-01-01" in text and "`scripts/gpu_check` at abc" in text
    assert "the maker states 989" in text and "| 128 | no |" in text


def test_a_wrong_loss_is_a_failure() -> None:
    """Goal: fast and wrong does not pass. Red with the comparison left out."""
    assert problems([], (11.0, 11.05)) == []
    assert "loss 11.5 on the GPU" in problems([], (11.0, 11.5))[0]
    assert problems([], (11.0, math.nan))


def test_the_model_is_the_stated_one() -> None:
    """Goal: 0.6B parameters, and documents that fill the micro-batches. Red with 14 layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen3_600m())
    assert sum(parameter.numel() for parameter in model.parameters()) == 596_049_920
    documents = make_documents(random.Random(0), 1000, 300, 50)
    assert 999 <= sum(map(len, documents)) <= 1000 and max(map(len, documents)) <= 300
