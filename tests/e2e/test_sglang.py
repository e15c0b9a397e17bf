"""The demo on the real SGLang, on a CPU, through the whole of `deploy`: an environment of its own, keys, learning."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from base_config import Config, load_config
from rollouts.engines.keys import API_KEY_VARIABLE
from rollouts.engines.launch import engine_url
from rollouts.run_dir import RunDir, read_jsonl
from rollouts.worker.processes import marked_processes
from tests.e2e.conftest import ROOT, processes_of
from tests.example_config import replace_at
from tests.remote.hosts import Host, Laptop, free_port, wait_for

DEMO = ROOT / "configs" / "00_cpu_sft_rl_sglang.py"
SEED = 1
# Its environment is built first where this machine has none: 85 s and 2.7 GB, kept with the trainer's.
BUILD_S = 900


def demo(tmp_path: Path, changes: dict[str, Any]) -> Config:
    config = load_config(DEMO)
    own = {"engine.sglang_port": free_port(), "output.save_dir": str(tmp_path / "results")}
    for path, value in {**own, **changes}.items():
        config = replace_at(config, path, value)
    config.save(tmp_path / "job.json")
    return config


def told_of_itself(config: Config, key: str) -> str:
    """What the engine answers at /server_info to the bearer of this key; "" where it is not up."""
    assert config.engine is not None
    try:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.get(f"{engine_url(config.engine)}/server_info", headers=headers, trust_env=False)
    except httpx.TransportError:
        return ""
    return answer.text if answer.status_code == 200 else ""


@contextmanager
def keys_seen(run: RunDir, config: Config) -> Iterator[dict[str, str]]:
    """The keys of a run, read from its secrets file as soon as that is there; and its mode. Under "told" what the
    engine says of itself to the bearer of the api key, as soon as it is up."""
    seen: dict[str, str] = {}
    done = threading.Event()

    def look() -> None:
        while not done.is_set() and not seen:
            try:
                seen.update(json.loads(run.secrets.read_text())["engine_keys"])
                seen["mode"] = oct(run.secrets.stat().st_mode & 0o777)
            except (OSError, ValueError):
                time.sleep(0.1)
        while not done.is_set() and not seen.get("told"):
            seen["told"] = told_of_itself(config, seen[API_KEY_VARIABLE])
            time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.mark.timeout(BUILD_S + 700)
def test_the_demo_learns_on_sglang(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: held-out exact match rises by >= 0.30 from the end of SFT to the end of RL, sampled by SGLang with the
    weights of each step. Red with rl.sync_every=1000 (log-probs 0.45 apart at step 2), and with the trainer's
    environment taken for the engine's ("The engine's environment has no package sglang")."""
    config = demo(tmp_path, {"model.init_seed": SEED, "data.shuffle_seed": SEED, "rl.seed": SEED})
    done = laptop.deploy(str(tmp_path / "job.json"), "--run-id", "demo", timeout_s=BUILD_S + 600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = RunDir(tmp_path / "results" / config.output.experiment_name / "demo")
    values = {row["stage"]: row["value"] for row in read_jsonl(run.eval) if row["metric"] == "exact_match"}
    print(values)
    assert values["rl"] - values["sft"] >= 0.30, values
    rl = [row for row in read_jsonl(run.metrics) if row["stage"] == "rl"]
    assert all(row["logp_diff_abs"] < 1e-5 for row in rl)  # of the weights that trained and those that sampled
    assert processes_of("demo") == []


SHORT = {
    "sft.num_iterations": 4,
    "sft.eval_every": -1,
    "rl.examples_per_step": 4,
    "rl.num_samples": 4,
    "rl.batch_size": 16,
    "rl.eval_every": -1,
    "data.rl_mixture.0.max_samples": 16,
    "data.eval_mixture.0.max_samples": 20,
    "output.experiment_name": "short",
}


@pytest.mark.timeout(BUILD_S + 400)
def test_the_same_over_ssh(laptop: Laptop, remote: Host, tmp_path: Path) -> None:
    """Goal: over a real sshd too, with both environments; and the run's keys stand in no file and no log once it has
    ended, nor in what the engine tells of itself. Red with keys that print as they are: SGLang logs its arguments; and
    with /server_info as SGLang has it."""
    config = demo(tmp_path, SHORT)
    there = RunDir(remote.run_path("far"))
    with keys_seen(there, config) as keys:
        done = laptop.deploy(
            str(tmp_path / "job.json"), "--remote", remote.target, "--run-id", "far", timeout_s=BUILD_S + 300
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = RunDir(tmp_path / "results" / "short" / "far")
    samples = read_jsonl(run.rollouts)
    assert len(samples) == 4 * 4 * 4 and {row["weight_version"] for row in samples} == {"0", "1", "2", "3"}
    built = {row["name"]: row["action"] for row in read_jsonl(run.events) if row["kind"] == "environment"}
    assert set(built) == {"trainer", "engine"}
    told = keys.pop("told")
    assert keys.pop("mode") == "0o600" and len(set(keys.values())) == 2
    assert '"admin_api_key":"***"' in told and not any(key in told for key in keys.values())
    assert "'api_key': '***'" in there.log("engine-0").read_text()  # it has one
    for directory in (there.path, run.path):
        for file in directory.rglob("*"):
            if file.is_file() and there.code_tree not in file.parents:
                assert not any(key.encode() in file.read_bytes() for key in keys.values()), file
    assert not any(key in done.stdout + done.stderr for key in keys.values())
    assert processes_of("far") == []


def scheduler_of(run: RunDir) -> int:
    """The process of the run's SGLang that holds the model."""
    pids = marked_processes(run.run_id, {"rl-engine-0"})
    (pid,) = (pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("sglang::sch"))
    return pid


@pytest.mark.timeout(BUILD_S + 600)
def test_its_scheduler_is_killed(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: kill -9 of SGLang's scheduler in the middle of RL costs one restart: every step is there once, sampled with
    the weights of its step, as the trainer's own log-probs show."""
    changes = {"data.rl_mixture.0.max_samples": 80, "engine.restarts_max": 1}
    demo(tmp_path, {**SHORT, **changes, "limits.engine_ready_timeout_s": 300.0})
    deploying = laptop.start(str(tmp_path / "job.json"), "--run-id", "killed")
    there = RunDir(laptop.rollouts_home / "runs" / "killed")
    wait_for(lambda: len(read_jsonl(there.rollouts)) >= 5 * 16, "five RL steps", timeout_s=BUILD_S + 300)
    os.kill(scheduler_of(there), signal.SIGKILL)
    out, err = deploying.communicate(timeout=500)
    assert deploying.returncode == 0, out[-4000:] + err[-4000:]
    run = RunDir(tmp_path / "results" / "short" / "killed")
    rl = [row for row in read_jsonl(run.metrics) if row["stage"] == "rl"]
    assert [row["step"] for row in rl] == list(range(1, 21))
    assert all(row["lag_max"] == 0 and row["logp_diff_abs"] < 1e-5 for row in rl)
    kinds = [row["kind"] for row in read_jsonl(run.events)]
    assert kinds.count("engine_restarted") == kinds.count("engine_recovered") == 1
    assert "engine_restarted" in out + err
    assert processes_of("killed") == []
