"""A model whose parameters are spread over ranks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.process_nursery import shared
from tests.weight_transfer.sending import expected_logprobs


def test_two_ranks_send_the_whole_model(embedded_url: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Goal: shards are gathered bucket by bucket, on all ranks alike, and the engine serves what one rank would have
    sent.
    """
    shared().torchrun(
        2, "tests.weight_transfer.sharded_ranks", [str(models["new"]), embedded_url, str(tmp_path)], tmp_path
    )
    found = json.loads((tmp_path / "rank_0.json").read_text())
    expected = expected_logprobs(AutoModelForCausalLM.from_pretrained(models["new"], dtype=torch.float32))
    assert found["tensor"] == ["1", pytest.approx(expected, abs=1e-5)]
    assert found["disk"] == ["2", pytest.approx(expected, abs=1e-5)]
