"""The smoke test as the control side plans it and shows it."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import RunDir, SmokeCheck, read_jsonl
from rollouts.view.display import live_lines
from rollouts.view.fold import View, fold
from tests.remote.hosts import WAIT_S, Laptop, wait_for, write_config
from tests.remote.test_gpu_configs import plan
from tests.remote.test_plan import CUDA, H200, HALF, SECOND, SGLANG, plan_for
from tests.remote.test_whole_runs import quiet
from tests.run_processes import processes_of

RUN = "/home/u/.rollouts/runs/r1"
# Not among the environment's markers of other tests: a variable that acts on devices
OWN = {"NCCL_DEBUG": "WARN"}


def checks(**changes: Any) -> list[SmokeCheck]:
    launch = plan_for(**changes).launch
    assert launch is not None
    return launch.smoke


def test_what_is_tried_on_one_card() -> None:
    """Goal: the trainer's environment on its card without torchrun, the engine's with its modules and compilers, and
    `--plan` shows both with device, driver and build. Red without the engine's compilers."""
    shown = plan("01_debug_sft_rl")
    assert shown.launch is not None
    trainer, engine = shown.launch.smoke
    python, engines = (
        f"{environment.path}/bin/python" for environment in shown.launch.environments
    )
    assert trainer.process.argv == [
        *(python, "-m", "rollouts.training.smoke", "trainer", "--device", "cuda"),
        *("--store", f"{RUN}/.ranks-bootstrap.tmp", "--report", f"{RUN}/.smoke-smoke.tmp"),
    ]
    assert trainer.process.env["CUDA_VISIBLE_DEVICES"] == "GPU-0" and not trainer.process.tools_of
    assert engine.process.argv == [
        *(engines, "-m", "rollouts.training.smoke", "engine", "--device", "cuda", "--cards", "1"),
        *(
            "--report",
            f"{RUN}/.smoke-smoke-engine.tmp",
            "--module",
            "rollouts.engines.sglang.launcher",
        ),
        *("--module", "sglang.launch_server", "--module", "sglang.srt.entrypoints.http_server"),
        *("--compilers", "ninja", "nvcc", "c++", "Python.h"),
    ]
    assert engine.process.tools_of == shown.launch.environments[1].path
    assert trainer.subject.startswith(
        "GPU 0 (NVIDIA H200), NVIDIA driver 580.65.06, torch build cu130"
    )
    assert any(
        step.what.startswith("smoke-engine: ") and "GPU 0 (NVIDIA H200)" in step.why
        for step in shown.steps
    )


def test_what_is_tried_on_several_cards() -> None:
    """Goal: an all-reduce needs all ranks, so torchrun starts them; the engine's check sees the cards of all replicas.
    A compiled model's compilers are tried too. Red with one rank, and with the first replica's cards."""
    launch = plan("rl_math").launch
    assert launch is not None
    trainer, engine = launch.smoke
    assert "--nproc-per-node 2 -m rollouts.training.smoke" in " ".join(trainer.process.argv)
    assert trainer.process.env["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert engine.process.env["CUDA_VISIBLE_DEVICES"] == "2,3" and "--cards 2" in " ".join(
        engine.process.argv
    )
    (compiled,) = checks(**CUDA, model__compile=True)
    assert compiled.process.argv[-3:] == ["--compilers", "c++", "Python.h"]


def test_on_a_cpu() -> None:
    """Goal: an engine that runs in the trainer's environment is tried there, in one process; no card is asked for. Red
    without its import."""
    (one,) = checks()
    argv = " ".join(one.process.argv)
    assert "trainer --device cpu" in argv and argv.endswith(
        "--module rollouts.engines.embedded.__main__"
    )
    assert one.subject.startswith("cpu, torch ")
    _, engine = checks(**SGLANG)
    assert (
        "--compilers" not in engine.process.argv
        and "rollouts.engines.sglang.cpu_launcher" in engine.process.argv
    )


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"facts": {"driver": "580.65.06"}}, False),
        ({"facts": {"gpus": (dataclasses.replace(H200, uuid="GPU-b"),)}}, False),
        ({"host__env": {"LD_LIBRARY_PATH": "/usr/local/cuda-13.0/compat"}}, False),
        (
            {
                "host__env": {"HF_ENDPOINT": "http://mirror"},
                "run_id": "r2",
                "rl__sampling__seed": 7,
            },
            True,
        ),
        ({"target__gpu_ranks": [0, 1], "facts": {"gpus": (H200, SECOND)}}, False),
        ({"model__compile": True}, False),
    ],
    ids=["nothing", "driver", "card", "libraries", "what does not act", "two ranks", "compiled"],
)
def test_what_is_tried_again(changes: dict[str, Any], same: bool) -> None:
    """Goal: a marker names environment, devices, driver and what acts on them, and nothing else: a run id in
    it would repeat the test in each run. Red with the driver left out, with all variables in it, and with paths of the
    run's directory."""
    base: dict[str, Any] = {**CUDA, **HALF, **SGLANG}
    before, after = (
        [check.marker for check in checks(**options)] for options in (base, {**base, **changes})
    )
    assert (before[0] == after[0]) is same
    # PYTHONPATH is in the run directory
    cpu = [checks(**SGLANG, run_id=run_id)[1].marker for run_id in ("r1", "r2")]
    assert cpu[0] == cpu[1]


def test_the_live_view_shows_one_step() -> None:
    """Goal: one line, at first running and then done. Red with a phase for each of the two events."""
    view = View()
    started = {"kind": "smoke_test_started", "time": 10.0, "windows": ["smoke"]}
    ended = {
        "kind": "smoke_test_ended",
        "time": 13.2,
        "action": "done",
        "seconds": 3.21,
        "parts": {"smoke": {"torch": 2.0}},
    }
    view = fold(view, "events.jsonl", started)
    assert live_lines(view, "", width=80, utf8=True, doing_s=2.0, host_now=12.0) == [
        "• smoke test            running, 2s"
    ]
    view = fold(view, "events.jsonl", ended)
    assert live_lines(view, "", width=80, utf8=True, doing_s=0.0, host_now=14.0) == [
        "✓ smoke test            done after 3.2 s"
    ]


def test_a_failure_is_the_runs_error(laptop: Laptop) -> None:
    """Goal: it ends the run before any stage, exit code not 0, and is what `status` and `ls` say, and the last on the
    screen."""
    config = str(write_config(laptop.project, env={"STAND_IN_SMOKE": "fail", **OWN}))
    done = laptop.deploy(config, "--run-id", "smoke-fails")
    said = "smoke test: bf16 product: wrong by 3, on device cuda:0 (NVIDIA H200) with torch 2.13.0, driver 580"
    assert done.returncode == 1
    run = RunDir(laptop.project / "runs" / "example" / "smoke-fails")
    assert not [row for row in read_jsonl(run.events) if row["kind"] == "stage_started"]
    assert f"error: {said}" in done.stdout.splitlines()[-8:], done.stdout
    assert laptop.json("status", "smoke-fails")["message"] == said
    assert laptop.json("ls")[0]["message"] == said
    quiet("smoke-fails")


def test_ctrl_c_and_stop_in_the_middle(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: Ctrl-C detaches from a smoke test that hangs and ends nothing; `deploy stop` leaves nothing, and the
    supervisor ends by itself."""
    reached = tmp_path / "reached"
    config = str(write_config(laptop.project, env={"STAND_IN_SMOKE": str(reached), **OWN}))
    process = laptop.start(config, "--run-id", "smoke-hangs", start_new_session=True)
    wait_for(reached.exists, "the smoke test")
    mirror = RunDir(laptop.project / "runs" / "example" / "smoke-hangs")
    wait_for(lambda: read_jsonl(mirror.events), "its first event here")
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=WAIT_S) and process.returncode == 130
    assert processes_of("smoke-hangs")
    assert laptop.json("status", "smoke-hangs")["stage"] == "bootstrap"
    assert laptop.json("stop", "smoke-hangs")["state"] == "stopped"
    quiet("smoke-hangs")
    status = json.loads((laptop.rollouts_home / "runs" / "smoke-hangs" / "status.json").read_text())
    assert status["message"] == "stopped by SIGTERM"
