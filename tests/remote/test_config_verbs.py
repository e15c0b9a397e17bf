"""`deploy new`, `explain` and `diff`, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from base_config import changed, load_config
from rollouts.remote import config_file_verbs, config_verbs
from rollouts.remote.errors import DeployError
from rollouts.run_dir import RunDir
from tests.example_config import example_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = Path(sys.executable).with_name("deploy")
ROWS = "".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(60))


def deploy(*words: str, cwd: Path, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEPLOY), *words], cwd=cwd, input=typed, capture_output=True, text=True, check=False
    )


def test_new_writes_a_config_that_deploys(tmp_path: Path) -> None:
    """Goal: what `deploy new` writes is a config without problems, and the command says what comes next; with --json
    it is one document. Red with the file written before it was checked."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    words = ("--mode", "sft", "--model", "Qwen/Qwen3-0.6B", "--data", "rows.jsonl", "--gpus", "1")
    done = deploy("new", "mine.py", *words, "--gpu-memory-gib", "24", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "mine.py")
    assert config.problems() == () and json.loads(done.stdout)["config"] == config.to_json()
    again = deploy("new", "mine.py", *words, "--gpu-memory-gib", "24", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_new_without_a_terminal_names_what_is_missing(tmp_path: Path) -> None:
    """Goal: a script is not asked: every missing option is named at once, and nothing is written. Red with the first
    alone."""
    done = deploy("new", "mine.py", "--mode", "sft", cwd=tmp_path, typed="")
    assert done.returncode == 2 and not (tmp_path / "mine.py").exists()
    assert all(f"--{name} …" in done.stderr for name in ("model", "data", "gpus", "gpu-memory-gib"))


def test_questions() -> None:
    """Goal: in a terminal what is missing is asked for, in order; a CPU has no GPU memory to ask for; an answer that is
    no number, or no mode, is an error. Red with all questions asked whatever was given."""
    asked: list[str] = []

    def ask(question: str, default: str | None) -> str:
        asked.append(question)
        return {"GPUs of the host (0: its CPU)": "0"}.get(question, default or "rows.jsonl")

    found = config_verbs.answered({"mode": "rl", "model": None}, ask=ask)
    assert found == {
        "mode": "rl",
        "model": "Qwen/Qwen3-0.6B",
        "data": "rows.jsonl",
        "gpus": 0,
        "gpu_memory_gib": 0.0,
    }
    assert [question.split(":")[0] for question in asked] == [
        "Model",
        "Data",
        "GPUs of the host (0",
    ]
    given: dict[str, Any] = {"model": "m", "data": "d", "gpus": 1, "gpu_memory_gib": 80.0}
    with pytest.raises(DeployError, match="--mode 'both'"):
        config_verbs.answered({**given, "mode": "both"}, ask=None)
    with pytest.raises(DeployError, match="'many' is not a number"):
        config_verbs.answered(
            {**given, "mode": "rl", "gpus": None}, ask=lambda question, default: "many"
        )


def test_ctrl_c_at_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: Ctrl-C or Ctrl-D at a question is an interruption. Red with typer's Abort, which was told as a crash."""

    def abort(question: str, default: str | None = None) -> str:
        raise typer.Abort

    monkeypatch.setattr(typer, "prompt", abort)
    with pytest.raises(KeyboardInterrupt):
        config_file_verbs._ask("Model", None)


def test_explain(tmp_path: Path) -> None:
    """Goal: one field, or all, with type and meaning; a misspelt one is an error with the nearest. Red with the error
    let through as a traceback."""
    one = deploy("explain", "rl.kl.kind", cwd=tmp_path)
    assert one.returncode == 0 and 'rl.kl.kind: "k1" | "k2" | "k3"' in one.stdout
    every = json.loads(deploy("explain", "--json", cwd=tmp_path).stdout)
    assert {"target.device_type", "rl.loss[PPO].clip_low", "output.mode"} <= {
        field["path"] for field in every
    }
    wrong = deploy("explain", "rl.kl.knd", cwd=tmp_path)
    assert (
        wrong.returncode == 2
        and "did you mean 'rl.kl.kind'" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


def write_run(path: Path, rate: float, packages: str) -> Path:
    """Write what a run's directory here has of a run."""
    run = RunDir(path)
    run.code.mkdir(parents=True)
    changed(example_config(), {"rl.matrix_lr": rate}).save(run.config)
    run.code_manifest.write_text('{"digest": "same"}')
    run.environment("trainer").write_text(packages)
    return path


def test_diff(tmp_path: Path) -> None:
    """Goal: two runs differ by the fields, the code and the environments in which they do, and what they have in common
    is said; equal ones by nothing. Red with environments left out."""
    first = write_run(tmp_path / "a", 1e-3, "torch==2.11\n")
    second = write_run(tmp_path / "b", 2e-3, "torch==2.12\n")
    answer = config_verbs.diff(str(first), str(second))
    assert [item["path"] for item in answer.document["differences"]] == [
        "rl.matrix_lr",
        "environment trainer",
    ]
    assert answer.document["same"] == ["code"] and "0.002" in str(answer.text)
    assert "no difference" in str(config_verbs.diff(str(first), str(first)).text)
    with pytest.raises(DeployError, match="there is no run 'nowhere'"):
        config_verbs.diff("nowhere", str(first))
