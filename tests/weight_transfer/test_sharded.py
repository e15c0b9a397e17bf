"""A model whose parameters are spread over ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.serving import REPOSITORY
from tests.weight_transfer.sending import expected_logprobs


def test_two_ranks_send_the_whole_model(embedded_url: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Goal: shards are gathered bucket by bucket, on all ranks alike, and the engine serves what one rank would have
    sent.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.weight_transfer.sharded_ranks", str(models["new"]), embedded_url, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "rank_0.json").read_text())
    expected = expected_logprobs(AutoModelForCausalLM.from_pretrained(models["new"], dtype=torch.float32))
    assert found["tensor"] == ["1", pytest.approx(expected, abs=1e-5)]
    assert found["disk"] == ["2", pytest.approx(expected, abs=1e-5)]
