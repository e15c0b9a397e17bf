"""`deploy offers` as a command, against the stand-ins."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_config import changed, load_config
from tests.cloud.fakes.server import KEY, FakeCloud
from tests.cloud.renting import RENTS
from tests.remote.hosts import ROOT


def deploy(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
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


def test_without_any_key(
    clouds: dict[str, FakeCloud], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: the error says where keys are looked for. Red with an empty table."""
    for name in clouds:
        monkeypatch.delenv(f"{name.upper()}_API_KEY")
    done = deploy("offers", code=2)
    assert "no provider has a key here" in done.stderr and "$LAMBDA_API_KEY, or " in done.stderr


def test_without_httpx(
    clouds: dict[str, FakeCloud], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: a base install says what to install. Red with the ImportError."""
    (tmp_path / "httpx.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip install 'rollouts[cloud]'" in deploy("offers", code=2).stderr


def config_that_rents(tmp_path: Path, hosts: int = 1, **changes: Any) -> str:
    config = load_config(str(ROOT / "configs" / "00_cpu_sft_rl.py"))
    file = tmp_path / "job.json"
    new = {"provision": replace(RENTS, **changes), "target.hosts": hosts, "sft.batch_size": 32}
    file.write_text(json.dumps(changed(config, new).to_json()))
    return str(file)


def test_offers_for_a_config(clouds: dict[str, FakeCloud], tmp_path: Path) -> None:
    """Goal: a config's provision section is the question, --set changes it, and what is near is listed with the reason
    why it is left out. Red with all providers asked."""
    config = config_that_rents(tmp_path, providers=["vast", "lambda"], price_per_hour_max=2.25)
    lines = deploy("offers", config).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["vast", "vast"] and len(
        clouds["prime"].requests
    ) == 0
    near = lines[lines.index("nearest, and why each is left out:") + 2 :]
    assert any("lambda" in line and line.endswith("over $2.25 an hour") for line in near), near
    assert any("vast" in line and line.endswith("reliability under 0.9") for line in near), near
    dearer = json.loads(
        deploy("offers", config, "--set", "provision.price_per_hour_max=9.0", "--json").stdout
    )
    assert {o["provider"] for o in dearer["offers"] if not o["left_out"]} == {"vast", "lambda"}
    both = deploy("offers", config, "--gpu", "H100", code=2)
    assert "CONFIG says all that is asked for" in both.stderr
    none = deploy("offers", str(ROOT / "configs" / "00_cpu_sft_rl.py"), code=2)
    assert "rents no machine" in none.stderr and "provision=None" in none.stderr
