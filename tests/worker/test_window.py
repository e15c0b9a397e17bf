"""The wrapper around a window's process: output byte for byte, exit truth, signals, a pane that does not matter."""

import os
import signal
import subprocess
import sys

from rollouts import run_dir
from tests.worker.stands import (
    Host,
    as_status,
    log,
    module,
    process,
    recorded_pid,
    script,
    stage,
    trainer,
    wait_for,
    wait_for_end,
)

FIVE_MB = """
import os, random
data = random.Random(0).randbytes(5_000_000)
while data:
    data = data[os.write(1, data[:1 << 16]):]
"""


def test_output_reaches_the_log_byte_for_byte(host: Host) -> None:
    """Goal: five megabytes at once, invalid UTF-8 and without a newline at the end, are in the log as written; stderr
    too. Red with the output read as text, and with the last read before the process's end."""
    import random

    run = host.finish(stage("sft", trainer(FIVE_MB)))
    assert run.log("trainer").read_bytes() == random.Random(0).randbytes(5_000_000)
    bars = "import sys; sys.stderr.write('\\r 10%\\r 20%'); sys.stdout.write('no newline')"
    run = host.finish(stage("sft", trainer(bars)))
    assert sorted(run.log("trainer").read_bytes().split(b"no newline")) == [b"", b"\r 10%\r 20%"]


def test_copying_the_output_does_not_hide_the_exit_code(host: Host) -> None:
    """Goal: `false | tee log` is 0 in a shell; here the record is that of `false`. Red with the code of the copying
    side recorded."""
    run = host.finish(stage("sft", process("trainer", ["/bin/sh", "-c", "echo said; false"])))
    record = run_dir.read_exit(run, "sft", "trainer")
    assert record is not None and (record.exit_code, record.signal, record.code) == (1, None, 1)
    assert record.started_at <= record.ended_at
    assert log(run, "trainer") == "said\n"


def test_a_file_that_cannot_be_executed(host: Host) -> None:
    """Goal: 126 and the reason, as a shell has it. Red with the error not caught: no exit record."""
    plain = host.home / "plain.txt"
    host.home.mkdir()
    plain.write_text("not a program")
    run = host.finish(stage("sft", process("trainer", [str(plain)])))
    assert as_status(run)["exit_code"] == 126
    assert "Permission denied" in log(run, "trainer")


def test_a_paused_pane_does_not_hold_up_the_process(host: Host) -> None:
    """Goal: Ctrl-S in an attached pane, which then takes no more output, leaves the process running to its end. Red
    with the pane written from the copying loop."""
    go = host.home / "go"
    text = (
        "import os, time\nprint('up', flush=True)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.05)\n{FIVE_MB}"
    )
    run = host.start(stage("sft", trainer(text)))
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
    subprocess.run(["tmux", "send-keys", "-t", f"={run.run_id}:=trainer", "C-s"], check=True)
    go.touch()
    wait_for_end(run)
    assert as_status(run)["state"] == "done"
    assert run.log("trainer").stat().st_size == 5_000_003


def captured(run_id: str) -> str:
    command = ["tmux", "capture-pane", "-p", "-t", f"={run_id}:=trainer"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_pane_shows_the_output(host: Host) -> None:
    """Goal: `tmux attach` shows what the log has. Red with nothing offered to the pane."""
    run = host.start(
        stage("sft", trainer("import time; print('step 1', flush=True); time.sleep(600)"))
    )
    wait_for(lambda: "step 1" in log(run, "trainer"), "the output")
    wait_for(lambda: "step 1" in captured(run.run_id), "the output in the pane")
    assert module("stop", str(run.path)).returncode == 0


def test_a_full_disk_does_not_hold_up_the_process(host: Host) -> None:
    """Goal: when the log cannot be written, the process still runs to its end. Red with the write error ending the
    copying: the process blocks on its output."""
    job = host.job(stage("sft", trainer(FIVE_MB)))
    run = host.launched[-1]
    run.log("trainer").parent.mkdir()
    run.log("trainer").symlink_to("/dev/full")  # every write: no space left on device
    assert host.launch(job).returncode == 0
    wait_for_end(run)
    assert as_status(run)["state"] == "done"


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(host: Host) -> None:
    """Goal: the grace ends. Red without the SIGKILL: the stop then waits for its own last resort."""
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    run = host.start(stage("sft", trainer(deaf)), stop_grace_s=0.3)
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
    assert module("stop", str(run.path)).returncode == 0
    record = run_dir.read_exit(run, "sft", "trainer")
    assert record is not None and record.signal == signal.SIGKILL


def test_a_process_may_finish_within_its_grace(host: Host) -> None:
    """Goal: what a trainer does on SIGTERM (a last checkpoint, say) is done before it is killed, and its code is kept.
    Red with SIGKILL sent at once."""
    tidy = """
import signal, sys, time
def end(*_):
    time.sleep(0.3); print("saved", flush=True); sys.exit(17)
signal.signal(15, end); print("up", flush=True); time.sleep(600)
"""
    run = host.start(stage("sft", trainer(tidy)), stop_grace_s=20.0)
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
    os.kill(recorded_pid(run, "supervisor"), signal.SIGTERM)
    wait_for_end(run)
    assert log(run, "trainer") == "up\nsaved\n"
    assert run_dir.read_exit(run, "sft", "trainer").exit_code == 17


def test_setproctitle_does_not_hide_a_process(host: Host) -> None:
    """Goal: programs that rewrite their title (SGLang, vLLM) overwrite /proc/pid/environ unless SPT_NOENV is set; it
    is. Red with the variable left out of the environment."""
    run = host.finish(
        stage("sft", process("trainer", script("import os; print(os.environ['SPT_NOENV'])")))
    )
    assert log(run, "trainer") == "1\n"
    assert sys.executable in run.plan.read_text()
