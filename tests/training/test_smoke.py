"""The smoke test's checks on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollouts.training import smoke

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_a_sound_machine() -> None:
    """Goal: all checks pass on a CPU."""
    smoke.run_all("cpu", store_file=None)


def test_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: attention that looks past a document's start is found, and build, driver and device are named.

    Red with a comparison of shapes alone."""
    right = smoke.Documents.of
    monkeypatch.setattr(smoke.Documents, "of", lambda lengths, device: right([sum(lengths)], device))
    with pytest.raises(smoke.SmokeError, match=r"attention, head_dim 64 is wrong by .*device cpu with torch .*driver"):
        smoke.check_attention(CPU, 64)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: exit 1 and one error line. Red with a traceback."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["smoke", "--device", "cuda"])
    assert smoke.main() == 1
    assert capsys.readouterr().err.startswith("error: torch sees no CUDA device 0 here: it sees 0")


def test_the_checklist_runs_on_a_cpu() -> None:
    """Goal: the first hour's lines run in order, to the end of what a CPU allows. Red with a line that fails."""
    command = ["scripts/gpu_first_hour", "--dry-run"]
    variables = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "s  smoke test" in done.stdout and done.stdout.endswith("done\n")
