"""A whole RL run, its engine killed at random again and again, beside one that is left alone: the same numbers."""

import contextlib
import dataclasses
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from base_config import Config
from rollouts.run_dir import RunDir, read_jsonl
from tests.engines.serving import embedded_argv
from tests.example_config import example_config, replace_at
from tests.ports import free_port
from tests.training import tiny_task
from tests.worker.stands import (
    Host,
    as_status,
    engine,
    events,
    log,
    process,
    recorded_pid,
    stage,
    wait_for,
    wait_for_end,
)

KILLS = int(os.environ.get("ROLLOUTS_TEST_KILLS", "4"))  # a campaign has more of them
STEPS = 12 + 4 * KILLS
KILLS_AT_START = max(1, KILLS // 5)  # of them: the life that follows a kill, before it is ready
WAIT_S = 1200.0  # a minute where nothing else runs
# of this machine and moment, not of the run
MEASURED = re.compile(r"time|.*_s|mfu|peak_memory_gib")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_task.tiny_model(seed=1).save_pretrained(directory)
    tiny_task.tiny_tokenizer().save_pretrained(directory)
    return directory


def job_config(model: Path, port: int, more: Mapping[str, Any]) -> Config:
    base = example_config()
    (held_out,) = base.data.eval_mixture
    changes = {
        "output.mode": "rl",
        "model.name": str(model),
        "model.init": "pretrained",
        "data.rl_mixture": [dataclasses.replace(base.data.rl_mixture[0], max_samples=4 * STEPS)],
        "data.eval_mixture": [dataclasses.replace(held_out, max_samples=8)],
        "rl.eval_every": STEPS // 3,
        "engine.sglang_port": port,
        "engine.restarts_max": KILLS + 2,
        "limits.stage_timeout_s": WAIT_S,
        **more,
    }
    for path, value in changes.items():
        base = replace_at(base, path, value)
    assert base.problems() == ()
    return base


def start(host: Host, model: Path, **more: Any) -> RunDir:
    """The real trainer and the real engine under the real supervisor; `more` changes the config."""
    port = free_port()
    config = job_config(
        model, port, {path.replace("__", "."): value for path, value in more.items()}
    )
    assert config.engine is not None
    url = f"http://127.0.0.1:{port}"
    serving = dataclasses.replace(
        engine(port, env=ENVIRONMENT), argv=embedded_argv(model, port), ready_timeout_s=WAIT_S
    )
    job = host.job(
        stage("rl", process("trainer", [], env=ENVIRONMENT), serving, timeout_s=WAIT_S),
        engine_restarts_max=config.engine.restarts_max,
        engine_hang_timeout_s=config.limits.engine_hang_timeout_s,
        restarts_max=config.limits.restarts_max,
    )
    run = RunDir(Path(job["plan"]["run_path"]))
    arguments = ["--run-dir", str(run.path), "--stage", "rl", "--engine-url", url]
    job["plan"]["stages"][0]["trainer"]["argv"] = [
        sys.executable,
        "-m",
        "rollouts.worker.trainer",
        *arguments,
    ]
    job["config"] = config.to_json()
    done = host.launch(job)
    assert done.returncode == 0, done.stderr
    return run


def await_(condition: Callable[[], Any], run: RunDir) -> Any:
    """Until `condition` gives something true, or the run has ended."""
    deadline = time.monotonic() + WAIT_S
    while as_status(run)["state"] in ("starting", "running"):
        if value := condition():
            return value
        assert time.monotonic() < deadline, log(run, "trainer")
        time.sleep(0.01)
    return condition()


def kill(run: RunDir, previous: int) -> int:
    """kill -9 of the engine's life after the one with id `previous`."""
    pid = await_(lambda: (found := recorded_pid(run, "engine-0")) != previous and found, run)
    assert pid, log(run, "supervisor")
    with contextlib.suppress(ProcessLookupError):  # it ended by itself just now: as good as killed
        os.kill(pid, signal.SIGKILL)
    return int(pid)


def kill_at_random(run: RunDir, rng: random.Random) -> list[str]:
    """KILLS times, at random moments of random steps and of starts; what was hit, in words."""
    killed, hits = 0, []
    at_start = set(rng.sample(range(1, KILLS), KILLS_AT_START))
    steps = sorted(rng.randrange(STEPS - 12) for _ in range(KILLS - KILLS_AT_START))
    for number in range(KILLS):
        if number in at_start:
            pause_s = rng.random() * 2  # importing torch alone takes longer
        else:
            step = steps.pop(0)
            await_(
                lambda step=step, n=number: serves(run, n) and len(read_jsonl(run.metrics)) >= step,
                run,
            )
            # a step or two: the last kill has to find a trainer that needs its engine
            pause_s = rng.random() * 0.15
            hits.append(f"after step {step}")
        if number in at_start:
            await_(lambda before=killed: recorded_pid(run, "engine-0") != before, run)
            hits.append("starting")
        time.sleep(pause_s)
        killed = kill(run, killed)
        hits[-1] += f" + {pause_s:.3f} s"
    return hits


def serves(run: RunDir, kills: int) -> bool:
    """Is the life after so many kills ready?"""
    kinds = [
        row["kind"] for row in events(run) if row["kind"] in ("engine_restarted", "engine_ready")
    ]
    return kinds.count("engine_restarted") == kills and kinds[-1:] == ["engine_ready"]


def numbers(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not MEASURED.fullmatch(key)}
        for row in read_jsonl(path)
    ]


@pytest.mark.timeout(2 * WAIT_S)
def test_the_loss_curve_does_not_depend_on_the_engines_deaths(host: Host, model: Path) -> None:
    """Goal: an engine killed again and again, while it generates, loads weights, idles or starts, changes no number
    of the run: every metric, sample, evaluation and final weight is that of the undisturbed run, to the bit.

    Not seen red as a whole: what it rests on is, piece by piece, in tests/engines/test_engine_pool.py.
    """
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed={seed}")
    disturbed, alone = start(host, model), start(host, model)
    hits = kill_at_random(disturbed, random.Random(seed))
    print(*hits, sep="\n")
    for run in (disturbed, alone):
        wait_for(
            lambda run=run: as_status(run)["state"] not in ("starting", "running"),
            "the end",
            timeout_s=WAIT_S,
        )
        wait_for_end(run)
        assert as_status(run)["state"] == "done", log(run, "supervisor") + log(run, "trainer")
    restarts = events(disturbed, "engine_restarted")
    assert len(restarts) == KILLS and not events(alone, "engine_restarted")
    assert all("SIGKILL" in row["reason"] for row in restarts)
    assert events(disturbed, "engine_recovered")
    losses = [row["loss"] for row in read_jsonl(alone.metrics)]
    assert len(losses) == STEPS and len(set(losses)) > STEPS // 2, (
        "a curve that could show a difference"
    )
    for file in ("metrics", "rollouts", "eval"):
        assert numbers(getattr(disturbed, file)) == numbers(getattr(alone, file)), file
    weights = [run.latest_checkpoint("rl") / "model.safetensors" for run in (disturbed, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


FEW, EVERY = 10, 3  # steps of a run whose trainer dies, and of them each that saves a checkpoint


@pytest.mark.timeout(2 * WAIT_S)
def test_the_loss_curve_does_not_depend_on_the_trainers_deaths(host: Host, model: Path) -> None:
    """Goal: a trainer killed twice, before its first checkpoint and after the second, changes no number of the run:
    every metric, sample, evaluation and final weight is that of the undisturbed run, to the bit."""
    spec = dataclasses.replace(example_config().data.rl_mixture[0], max_samples=4 * FEW)
    changes = {"data__rl_mixture": [spec], "rl__save_every": EVERY, "rl__eval_every": 2}
    disturbed = start(host, model, limits__restarts_max=2, **changes)
    alone = start(host, model, **changes)
    for number, at in enumerate((EVERY - 1, 2 * EVERY), 1):  # long before its last step
        await_(lambda at=at: len(read_jsonl(disturbed.metrics)) >= at, disturbed)
        os.kill(recorded_pid(disturbed, "trainer"), signal.SIGKILL)
        await_(lambda n=number: len(events(disturbed, "stage_restarted")) >= n, disturbed)
    for run in (disturbed, alone):
        wait_for_end(run)
        assert as_status(run)["state"] == "done", log(run, "supervisor") + log(run, "trainer")
    told = [(row["step"], row["restarts_left"]) for row in events(disturbed, "stage_restarted")]
    assert told == [(0, 1), (2 * EVERY, 0)] or told == [(0, 1), (EVERY, 0)], told
    assert len(read_jsonl(alone.metrics)) == FEW
    for file in ("metrics", "rollouts", "eval"):
        assert numbers(getattr(disturbed, file)) == numbers(getattr(alone, file)), file
    weights = [run.latest_checkpoint("rl") / "model.safetensors" for run in (disturbed, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
