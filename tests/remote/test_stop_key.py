"""The key `s` of the live display, from the terminal over SSH to the run: it asks, and stops as `deploy stop` does."""

import fcntl
import os
import pty
import secrets
import select
import struct
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_status
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.test_stop_phases import REACHED
from tests.remote.test_whole_runs import quiet


class LiveDeploy:
    """`deploy` with a terminal of its own."""

    def __init__(self, laptop: Laptop, *arguments: str) -> None:
        self._end, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process: subprocess.Popen[str] = laptop.start(
            *arguments,
            env={"TERM": "xterm", "NO_COLOR": "1"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.shown = ""  # since the last key

    def press(self, key: str) -> None:
        self.shown = ""
        os.write(self._end, key.encode())

    def shows(self, text: str) -> bool:
        """Read what has come, and return whether the text is in it."""
        while select.select([self._end], [], [], 0.05)[0]:
            try:
                data = os.read(self._end, 1 << 16)
            except OSError:  # the process has ended
                break
            self.shown += data.decode(errors="replace")
        return text in self.shown

    def close(self) -> None:
        os.close(self._end)


def test_s_and_y_stop_the_run_on_its_host(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: s asks, another key than y changes nothing, y ends every process of the run after a checkpoint, and the
    command goes on to the end: it shows the state, brings the results, exits as the run did. Red with `stop_on` left
    out of `watch_run`, and with the answer taken for a Ctrl-C (the command detaches)."""
    host, run_id = make_host(), f"stop-{secrets.token_hex(4)}"
    never = f"{tmp_path}/never"
    env = {"STAND_IN_STEPS": "9", "STAND_IN_WAIT": never, "STAND_IN_ENGINE_WAIT": never}
    config = str(write_config(laptop.project, env=env))
    remote = ["--remote", host.target, "--run-id", run_id]
    assert laptop.deploy(config, *remote, "--detach").returncode == 0
    run = RunDir(host.run_path(run_id))
    wait_for(lambda: REACHED["training"](run), "training")
    live = LiveDeploy(laptop, "attach", run_id)
    try:
        wait_for(lambda: live.shows("step"), "the display")
        for answer in ("n", "y"):
            live.press("s")
            wait_for(lambda: live.shows("stop the run after a checkpoint?"), "the question")
            status = read_status(run)
            assert status is not None and status.state == "running", "nothing is done unasked"
            live.press(answer)
            if answer == "n":
                wait_for(lambda: live.shows("d detach"), "the display as before")
        wait_for(lambda: live.shows("\0") or live.process.poll() is not None, "the end")
        assert live.process.returncode == 143, live.shown
        assert live.shows(f"{run_id}: stopped") and "detached" not in live.shown
    finally:
        live.process.kill()
        live.close()
    quiet(run_id)
    status = read_status(run)
    assert status is not None and status.state == "stopped"
    mirror = RunDir(laptop.project / "runs" / "example" / run_id)
    assert manifest_problems(mirror.checkpoints / "sft/step_000002") == ()
