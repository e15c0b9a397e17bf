"""The smoke test of a run: before any stage, once on a host, bounded, and with nothing left of it."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import RunDir, SmokeCheck, StageSpec
from rollouts.worker.supervise import smoke_windows
from tests.worker.stands import (
    PATIENCE_S,
    Host,
    as_status,
    events,
    log,
    module,
    process,
    recorded_pid,
    script,
    stage,
    survivors,
    trainer,
    wait_for,
    wait_for_end,
)

PASSES = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(json.dumps({"doing": "", "parts": {"torch": 0.5}}))
print("tried", flush=True)
"""
HANGS = """
import json, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(json.dumps({"doing": "bf16 product", "parts": {"torch": 0.5}}))
print("in it", flush=True)
time.sleep(600)
"""
SHELL_HANGS = """
trap '' TERM
printf '{"doing": "bf16 product", "parts": {"torch": 0.5}}' > "$1"
setsid sleep 600 &
sleep 600
"""
TRAINS = stage("sft", trainer("print('trained')"))


def check(
    host: Host, text: str, *, window: str = "smoke", timeout_s: float = PATIENCE_S, **options: Any
) -> SmokeCheck:
    """A check that is a script; the run's report file is its argument (`run` gives it)."""
    (host.home / "envs" / "e1").mkdir(parents=True, exist_ok=True)
    return SmokeCheck(
        process=process(window, script(text), **options),
        timeout_s=timeout_s,
        marker=f"{host.home}/envs/e1/.smoke-{window}",
        subject="GPU 0 (NVIDIA H200), NVIDIA driver 580.65.06, torch build cu130",
    )


def start(host: Host, *checks: SmokeCheck, stages: tuple[StageSpec, ...] = (TRAINS,)) -> RunDir:
    job = host.job(*stages, smoke=list(checks), stop_grace_s=0.2)
    run = host.launched[-1]
    for item in job["plan"]["smoke"]:
        item["process"]["argv"].append(str(run.smoke_report(item["process"]["window"])))
    assert host.launch(job).returncode == 0
    return run


def finish(host: Host, *checks: SmokeCheck) -> RunDir:
    run = start(host, *checks)
    wait_for_end(run)
    return run


def test_once_on_a_host_before_any_stage(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: checks run side by side before the stage, their seconds are in an event; the next run does not repeat them,
    but for one whose marker names something else. Another driver is another marker.

    Red without the call; with no marker written; and with the driver left out of the marker's name.
    """
    first = finish(host, check(host, PASSES), check(host, PASSES, window="smoke-engine"))
    kinds = [row["kind"] for row in events(first)]
    assert (
        kinds.index("smoke_test_started")
        < kinds.index("smoke_test_ended")
        < kinds.index("stage_started")
    )
    (ended,) = events(first, "smoke_test_ended")
    assert ended["action"] == "done" and ended["seconds"] > 0
    assert ended["parts"] == {"smoke": {"torch": 0.5}, "smoke-engine": {"torch": 0.5}}
    assert log(first, "smoke") == "tried\n" and not [*first.path.glob(".smoke-*")]
    changed = check(host, PASSES, window="smoke-other")
    second = finish(host, check(host, "raise SystemExit('repeated')"), changed)
    assert as_status(second)["state"] == "done"
    assert events(second, "smoke_test_started")[0]["windows"] == ["smoke-other"]
    third = finish(host, check(host, "raise SystemExit('repeated')"))
    (ended,) = events(third, "smoke_test_ended")
    assert (ended["action"], ended["parts"]) == ("reused", {"smoke": {"torch": 0.5}})
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\n")
    assert smoke_windows._marker(changed).is_file()
    monkeypatch.setattr(smoke_windows, "DRIVER_FILE", driver)
    assert not smoke_windows._marker(changed).is_file()


FAILS = [
    (
        "print('error: smoke test: torch: no CUDA device 0'); raise SystemExit(1)",
        "smoke test: torch: no CUDA device 0",
    ),
    (
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "smoke test: smoke was ended by SIGSEGV, on GPU 0 (NVIDIA H200), NVIDIA driver 580.65.06, torch build cu130",
    ),
]


@pytest.mark.parametrize(("text", "said"), FAILS, ids=["a sentence", "a crash"])
def test_a_check_that_fails_ends_the_run(host: Host, text: str, said: str) -> None:
    """Goal: no stage starts; the message is the run's, by its own words or with driver, build and device; the other
    check is ended; the next run tries again. Red with the failure noted and the run going on."""
    run = finish(host, check(host, text), check(host, HANGS, window="smoke-engine"))
    status = as_status(run)
    assert (status["state"], status["exit_code"], status["stage"]) == ("failed", 1, "bootstrap")
    assert status["message"].startswith(said), status["message"]
    (error,) = events(run, "error")
    assert (error["message"], error["window"]) == (status["message"], "smoke")
    assert not events(run, "stage_started") and not events(run, "smoke_test_ended")
    assert not [*(host.home / "envs" / "e1").glob(".smoke-*")]


def test_a_check_that_hangs_is_bounded(host: Host) -> None:
    """Goal: a driver that hangs ends the run with the part, the device and what to look at; nothing is left. Red
    without the limit: the run waits for ever."""
    hangs = check(host, "", timeout_s=4.0)
    argv = ["/bin/sh", "-c", SHELL_HANGS, "sh"]  # it is in its part at once, also on a slow machine
    run = finish(host, replace(hangs, process=replace(hangs.process, argv=argv)))
    status = as_status(run)
    assert status["state"] == "failed" and not events(run, "stage_started")
    for words in (
        "smoke was not over after 4 s, in its part 'bf16 product', on GPU 0 (NVIDIA H200)",
        "NVRM: Xid",
    ):
        assert words in status["message"]
    assert survivors(run) == []


@pytest.mark.parametrize("way", ["stop", "interrupt", "kill"])
def test_an_end_in_the_middle_leaves_nothing(host: Host, way: str) -> None:
    """Goal: `deploy stop`, a Ctrl-C in the supervisor's window and its death end the checks, with what they started in
    sessions of their own. Red without the tick in the wait (a stop is not noticed). After a kill each wrapper ends its
    own, and the supervisor's what is left: one of both would do."""
    run = start(host, check(host, HANGS))
    wait_for(lambda: log(run, "smoke") == "in it\n", "the check")
    if way == "stop":
        assert json.loads(module("stop", str(run.path)).stdout) == {
            "state": "stopped",
            "exit_code": 143,
        }
        assert as_status(run)["message"] == "stopped by SIGTERM"
    else:
        os.kill(
            recorded_pid(run, "supervisor"), signal.SIGINT if way == "interrupt" else signal.SIGKILL
        )
        wait_for_end(run)
        assert way == "kill" or as_status(run)["message"] == "stopped by SIGINT"
    assert survivors(run) == [] and not events(run, "stage_started")
