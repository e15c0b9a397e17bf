"""The matrix: each fault, in each phase in which it can happen."""

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.run_dir import read_jsonl, read_status
from tests.faults.lab import World, check_end, follow_to_end, world
from tests.remote.hosts import descendants, wait_for, write_config
from tests.remote.test_whole_runs import processes_of

HELD_S = 2.0  # a link is down, or a process stopped: longer than a poll, shorter than any patience


@dataclass(frozen=True)
class Fault:
    """`strike` does it and mends it. `survives`: the run ends well all the same. `follows`: deploy itself goes on."""

    name: str
    strike: Callable[[World, "subprocess.Popen[str]"], Any]
    survives: bool = True
    follows: bool = True
    phases: tuple[str, ...] = ("registered", "uploading", "launched", "training", "pulling")
    delay_s: float = 0.0


def flap(made: World, deploy: "subprocess.Popen[str]") -> None:
    for _ in range(6):
        made.link.cut()
        time.sleep(HELD_S / 6)


def go_down(made: World, deploy: "subprocess.Popen[str]") -> None:
    made.link.set_down(True)
    time.sleep(HELD_S)
    made.link.set_down(False)


def lose_sshd(made: World, deploy: "subprocess.Popen[str]") -> None:
    made.host.stop()
    time.sleep(HELD_S)
    made.host.start()


def kill_deploy(made: World, deploy: "subprocess.Popen[str]") -> None:
    deploy.kill()


def pause_deploy(made: World, deploy: "subprocess.Popen[str]") -> None:
    deploy.send_signal(signal.SIGSTOP)
    time.sleep(HELD_S)
    deploy.send_signal(signal.SIGCONT)


def kill_children(made: World, deploy: "subprocess.Popen[str]") -> None:
    for pid in descendants(deploy.pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def on_host(words: str, number: int) -> Callable[[World, "subprocess.Popen[str]"], None]:
    """Return a strike that sends a signal to the run's processes of that command line; one that stops goes on again."""

    def strike(made: World, deploy: "subprocess.Popen[str]") -> None:
        found = wait_for(
            lambda: [pid for pid in processes_of(made.run_id) if words in command_of(pid)] or ended(made), words
        )
        for pid in found if isinstance(found, list) else []:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
                if number == signal.SIGSTOP:
                    time.sleep(HELD_S)
                    os.kill(pid, signal.SIGCONT)

    return strike


def ended(made: World) -> bool:
    status = read_status(made.there)
    return status is not None and status.state not in ("starting", "running")


def reboot(made: World, deploy: "subprocess.Popen[str]") -> None:
    made.host.stop()
    for pid in processes_of(made.run_id):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(HELD_S / 2)
    made.host.start()


def attach_too(made: World, deploy: "subprocess.Popen[str]") -> None:
    out, err = made.laptop.start("attach", made.run_id).communicate(timeout=400)
    assert "Traceback" not in out + err, err


def damage_mirror(made: World, deploy: "subprocess.Popen[str]") -> None:
    """Flip a byte of what was pulled: the last pull compares, and mends it."""
    deploy.send_signal(signal.SIGINT)
    deploy.wait(timeout=200)
    log = made.here.log("trainer")
    if log.exists() and (data := log.read_bytes()):
        log.write_bytes(b"X" + data[1:])


def stop_elsewhere(made: World, deploy: "subprocess.Popen[str]") -> None:
    stopped = made.laptop.deploy("stop", made.run_id)
    assert stopped.returncode == 0, stopped.stderr


STEPS = ("training", "pulling")
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("nothing, at +80 ms", lambda made, deploy: None, delay_s=0.04),
        Fault("link cut", lambda made, deploy: made.link.cut()),
        Fault("link down 2 s", go_down),
        Fault("link flapping", flap),
        Fault("sshd and its sessions killed", lose_sshd),
        Fault("kill -9 deploy", kill_deploy, follows=False),
        Fault("SIGSTOP deploy 2 s", pause_deploy),
        Fault("kill -9 deploy's rsync and ssh", kill_children),
        Fault("link cut at +80 ms", lambda made, deploy: made.link.cut(), delay_s=0.04),
        Fault("attach beside deploy", attach_too, phases=("launched", *STEPS)),
        Fault("a byte of the mirror flipped", damage_mirror, follows=False, phases=STEPS),
        Fault("kill -9 supervisor", on_host("supervise.supervisor", KILL), survives=False, phases=STEPS),
        Fault("SIGSTOP supervisor 2 s", on_host("supervise.supervisor", STOP), phases=STEPS),
        Fault("kill -9 trainer", on_host("worker.trainer", KILL), survives=False, phases=STEPS),
        Fault("SIGSTOP trainer 2 s", on_host("worker.trainer", STOP), phases=STEPS),
        Fault("kill -9 the wrappers", on_host("supervise.window", KILL), survives=False, phases=STEPS),
        Fault("reboot", reboot, survives=False, phases=("launched", *STEPS)),
        Fault("stop by another command", stop_elsewhere, survives=False, phases=("launched", *STEPS)),
    )
}
PHASES: dict[str, Callable[[World], Any]] = {
    "registered": lambda made: (made.laptop.rollouts_home / f"registry/{made.run_id}.json").exists(),
    "uploading": lambda made: (made.there.path / "code").exists(),
    "launched": lambda made: made.there.status.exists(),
    "training": lambda made: read_jsonl(made.there.metrics),
    "pulling": lambda made: any(made.here.checkpoints.glob("sft/*")),
}
CELLS = [(name, phase) for name, fault in FAULTS.items() for phase in fault.phases]


def run_cell(shared: Path, directory: Path, name: str, phase: str, *, pause_s: float = 0.0) -> str:
    """Run one cell, which strikes `pause_s` after the phase is reached. Returns how the run ended.

    Raises AssertionError for what does not hold.
    """
    fault = FAULTS[name]
    run_id = f"f{secrets.token_hex(4)}"
    with world(shared, directory, run_id, delay_s=fault.delay_s) as made:
        env = {"STAND_IN_STEP_S": "0.3", "STAND_IN_CHECKPOINT_BYTES": "3000000"}
        config = str(write_config(made.laptop.project, env=env))
        log = (directory / "deploy.log").open("w")
        deploy = made.laptop.start(
            config, "--remote", made.target, "--run-id", run_id, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: PHASES[phase](made) or deploy.poll() is not None, phase)
            time.sleep(pause_s)
            fault.strike(made, deploy)
            first = [deploy.wait(timeout=400)]
        finally:
            deploy.kill()
            deploy.wait()
            log.close()
        said = (directory / "deploy.log").read_text()
        assert "Traceback" not in said, said[-3000:]
        codes = first if fault.follows and first == [0] else [*first, *follow_to_end(made)]
        return check_end(made, codes, survives=fault.survives)
