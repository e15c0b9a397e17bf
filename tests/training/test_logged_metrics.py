"""docs/reference/metrics.md against what real runs log: every documented key, and no other."""

import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch

from rollouts.training import flops
from rollouts.training.backends.minimal import complete
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops import run_rl_training, run_sft_training
from rollouts.training.loops.throughput import GIB, Throughput, peak_memory_gib
from rollouts.training.metrics import JSONLLogger
from rollouts.training.model_loading import load_model
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import policy_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.types import RLTrainingConfig, RolloutConfig, Sample, SFTTrainingConfig
from rollouts.training.value_head import ValueHead
from tests.training import tiny_task
from tests.training.tiny import PAD, sft_samples, tiny_backend, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md"
PEAK = 1e12


def documented(stage: str) -> set[str]:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 30 and {of for _, of in rows} == {"both", "sft", "rl"}
    return {key for key, of in rows if of in ("both", stage)}


UNITS = {
    *("count", "tokens", "tokens/s", "s", "GiB", "steps", "share", "reward", "reward²", "none"),
    *("nats per token", "nats per token; rl: none", "the metric's"),
}


def test_each_metric_has_a_unit_and_a_formula() -> None:
    """Goal: no entry of the page lacks one. Red with a unit left out, and with a row of three cells."""
    rows = re.findall(r"^\| `[^`]+` \| (?:both|sft|rl) \|.*$", PAGE.read_text(), re.MULTILINE)
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 4 and cells[2] in UNITS and len(cells[3]) > 5, row
    assert len(rows) > 30


def compare(keys: set[str], stage: str) -> None:
    """Every documented key (a <name> stands for any) is among `keys`, and every one of these is documented."""
    patterns = {key: re.compile(re.sub(r"<\w+>", "[a-z_]+", key)) for key in documented(stage)}
    assert [key for key, pattern in patterns.items() if not any(map(pattern.fullmatch, keys))] == []
    assert sorted(key for key in keys if not any(p.fullmatch(key) for p in patterns.values())) == []


def logged(path: Path) -> set[str]:
    """Of the file: what the logger itself adds is no metric."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(
        math.isfinite(value)
        for record in records
        for value in record.values()
        if not isinstance(value, str)
    )
    return {key for record in records for key in record} - {"time", "stage"}


class Engine(tiny_task.InProcessEngine):
    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        self.model = load_model(checkpoint_path).eval()
        return {"success": True}


def has_contrast(group: list[Sample]) -> bool:
    return len({sample.reward for sample in group}) > 1


def many_letters(sample: Sample) -> float:
    return float(sum(letter.isalpha() for letter in sample.response) > 1)


def test_an_rl_run_logs_what_is_documented(tmp_path):
    """Goal: docs/reference/metrics.md is true of RL, with filters, reference, value head and evaluation. Red with
    lag_mean's row taken out of the page, and with the metric taken out of the loop.
    """
    tokenizer, model = tiny_task.tiny_tokenizer(), tiny_task.tiny_model(seed=3)
    width = model.config.hidden_size
    backend = PyTorchTrainingBackend(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        loss_fn=partial(policy_loss, loss="ppo", kl_coef=0.1, value_coef=0.5),
        checkpoint_dir=tmp_path / "rl",
        reference=as_reference(tiny_task.tiny_model(seed=4), "seed 4"),
        value_head=ValueHead(width, lr=1e-3),
    )
    engine = Engine(model, tokenizer)
    prompts = [
        {"messages": [{"role": "user", "content": "abc"[: 1 + n % 3]}], "answer": ""}
        for n in range(8)
    ]
    generate_fn = make_generate_fn([engine], tokenizer, max_new_tokens=3, temperature=1.0)
    config = RolloutConfig(
        batch_size=2,
        n_samples_per_prompt=4,
        generate_fn=generate_fn,
        filter_fn=has_contrast,
        retries_max=50,
        over_sampling_factor=2.0,
    )
    buffer = DataBuffer(prompts)
    logger = JSONLLogger(tmp_path / "metrics.jsonl", stage="rl")
    anyio.run(
        lambda: run_rl_training(
            backend,
            buffer,
            AsyncRolloutManager(buffer, config),
            [engine],
            RLTrainingConfig(num_steps=3, baseline="value", policy_lag_steps_max=1),
            metrics_logger=logger,
            reward_fn=many_letters,
            eval_fn=lambda step: {"exact_match": 0.5},
            peak_flops=PEAK,
        )
    )
    compare(logged(logger.path), "rl")


def test_an_sft_run_logs_what_is_documented(tmp_path):
    """Goal: docs/reference/metrics.md is true of SFT; times add up; MFU is flops.py's. Red with step_s in place of
    train_s."""
    logger = JSONLLogger(tmp_path / "metrics.jsonl", stage="sft")
    samples = sft_samples(6)
    config = SFTTrainingConfig(num_steps=2, batch_size=6, log_every=1)
    (first, _) = anyio.run(
        lambda: run_sft_training(
            tiny_backend(tmp_path / "sft"),
            samples,
            config,
            logger,
            pad_token_id=PAD,
            eval_fn=lambda step: {"validation_loss": 1.0},
            peak_flops=PEAK,
        )
    )
    compare(logged(logger.path), "sft")
    lengths = [len(sample.tokens) for sample in samples]
    tokens = sum(lengths)
    assert first["data_s"] + first["train_s"] == pytest.approx(first["step_s"])
    assert first["tokens_per_s"] == pytest.approx(tokens / first["step_s"])
    length = sum(n * n for n in lengths) / tokens
    share = first["trained_tokens"] / tokens
    per_token = flops.flops_per_token(tiny_model().config, length, head_share=share)
    assert first["mfu"] == pytest.approx(per_token * tokens / first["train_s"] / PEAK)
    assert 0.05 < first["peak_memory_gib"] < 64


def test_mfu_is_left_out_where_it_is_not_known(tmp_path):
    """Goal: no made-up utilisation, and no error. Red with a peak of 1.0 for cards that are not listed."""
    backend = tiny_backend(tmp_path)
    unknown = Throughput.of_backend(backend)
    assert unknown.peak is None and "mfu" not in unknown.metrics([4], 2.0, train_s=1.0, step_s=1.0)
    backend.model.config.model_type = "mamba"
    assert "mfu" not in Throughput.of_backend(backend, PEAK).metrics(
        [4], 2.0, train_s=1.0, step_s=1.0
    )
    # of a user's own: no device, no model
    bare: Any = SimpleNamespace(forward_backward=None, optim_step=None)
    assert set(
        Throughput.of_backend(complete(bare), PEAK).metrics([4], 2.0, train_s=1.0, step_s=1.0)
    ) == {
        "trained_tokens",
        "tokens_per_s",
        "peak_memory_gib",
    }


def test_several_passes_and_peak_memory(tmp_path):
    """Goal: each update of a batch counts as work done; memory grows with what is held. Red with KiB read as bytes."""
    throughput = Throughput.of_backend(tiny_backend(tmp_path), PEAK)
    once, twice = (
        throughput.metrics([4], 2.0, train_s=1.0, step_s=1.0, passes=n)["mfu"] for n in (1, 2)
    )
    assert twice == pytest.approx(2 * once)
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(int((before + 0.25) * GIB) // 4)
    assert peak_memory_gib(torch.device("cpu")) > before + 0.1
    del held
