"""`deploy offers` as a command, against the stand-ins."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.fakes.server import KEY, FakeCloud
from tests.remote.hosts import ROOT


def deploy(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy.py"), *arguments], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert KEY not in done.stdout + done.stderr
    return done


def test_a_table_over_all_providers(clouds: dict[str, FakeCloud]) -> None:
    """Goal: one table, the cheapest first, with the reasons of what is left out; a provider that fails, and one without
    a key, are named."""
    out = deploy("offers", "--gpu", "h100", "--max-price", "2.8").stdout.splitlines()
    assert out[0].split()[:2] == ["provider", "gpu"]
    assert [line.split()[0] for line in out[1:10]] == ["prime", *["vast"] * 6, "lambda", "lambda"]
    assert "left out  150 of prime: another GPU" in out
    clouds["vast"].key_works = False
    done = deploy("offers", "--json", "--gpu", "H100")
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found["problems"]) == ["vast"] and "[key]" in found["problems"]["vast"]["found"]
    assert found["offers"][0]["price_per_gpu_hour"] == 1.99 and found["offers"][0]["left_out"] == ""
    assert "error: vast refuses the key in $VAST_API_KEY" in done.stderr


def test_nothing_fits(clouds: dict[str, FakeCloud]) -> None:
    """Goal: programs tell from the exit code that there is nothing to rent. Red with 0."""
    assert "no machine fits" in deploy("offers", "--max-price", "0.01", code=2).stdout


def test_without_any_key(clouds: dict[str, FakeCloud], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: the error says where keys are looked for. Red with an empty table."""
    for name in clouds:
        monkeypatch.delenv(f"{name.upper()}_API_KEY")
    done = deploy("offers", code=2)
    assert "no provider has a key here" in done.stderr and "$LAMBDA_API_KEY, or " in done.stderr


def test_without_httpx(clouds: dict[str, FakeCloud], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: a base install says what to install. Red with the ImportError."""
    (tmp_path / "httpx.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip install 'rollouts[cloud]'" in deploy("offers", code=2).stderr
