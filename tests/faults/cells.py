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
from tests.faults.lab import COMPILER, Setting, World, check_end, check_said, follow_to_end, world
from tests.remote.hosts import descendants, wait_for, write_config
from tests.run_processes import processes_of

PLAIN = Setting()
HELD_S = 2.0  # a link is down, or a process stopped: longer than a poll, shorter than any patience


@dataclass(frozen=True)
class Fault:
    """`strike` does it and mends it. `survives`: the run ends well all the same. `follows`: deploy itself goes on.

    The run takes its second step only when the phase is seen here; where it `waits`, only after the strike.
    """

    name: str
    strike: Callable[[World, "subprocess.Popen[str]"], Any]
    survives: bool = True
    follows: bool = True
    phases: tuple[str, ...] = ("registered", "uploading", "launched", "training", "pulling")
    setting: Setting = PLAIN
    possible: bool = True  # on this machine
    waits: bool = False
    steps: int = 3  # of each stage


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
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    return ""


def on_host(words: str, number: int) -> Callable[[World, "subprocess.Popen[str]"], None]:
    """Return a strike that sends a signal to the run's processes of that command line; one that stops goes on again."""

    def strike(made: World, deploy: "subprocess.Popen[str]") -> None:
        found = wait_for(
            lambda: (
                [pid for pid in processes_of(made.run_id) if words in command_of(pid)]
                or ended(made)
            ),
            words,
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
    check_said(out + err)


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


def run_out_of_memory(made: World, deploy: "subprocess.Popen[str]") -> None:
    """Have the kernel end the trainer: its processes may take no more than they have."""
    group = MEMORY / made.run_id
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("1000000")
    trainers = wait_for(
        lambda: (
            [pid for pid in processes_of(made.run_id) if "worker.trainer" in command_of(pid)]
            or ended(made)
        ),
        "a trainer",
    )
    for pid in trainers if isinstance(trainers, list) else []:
        with contextlib.suppress(OSError):
            (group / "cgroup.procs").write_text(str(pid))


def jump(side: str, by: str) -> Callable[[World, "subprocess.Popen[str]"], None]:
    """Return a strike that puts a side's time of day off, for the rest of the run."""

    def strike(made: World, deploy: "subprocess.Popen[str]") -> None:
        (made.host.directory.parent / f"clock-{side}").write_text(by)

    return strike


def fill(side: str) -> Callable[[World, "subprocess.Popen[str]"], None]:
    """Return a strike that fills a side's disk for a while."""

    def strike(made: World, deploy: "subprocess.Popen[str]") -> None:
        disk = made.host.home.parent if side == "there" else made.laptop.project / "runs"
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))
        time.sleep(HELD_S)
        filler.unlink()

    return strike


def tear(made: World, deploy: "subprocess.Popen[str]") -> None:
    """Put half a row into the host's rows, and nonsense in place of its status."""
    for file in (made.there.events, made.there.metrics):
        with file.open("ab") as stream:
            stream.write(b'{"time":1,"kind":"no')
    made.there.status.write_bytes(b"\xff\xfe{")


def together(*arguments: str) -> Callable[[World, "subprocess.Popen[str]"], None]:
    """Return a strike: the command, twice at once."""

    def strike(made: World, deploy: "subprocess.Popen[str]") -> None:
        both = [made.laptop.start(*arguments, made.run_id) for _ in range(2)]
        for one in both:
            out, err = one.communicate(timeout=400)
            assert one.returncode == 0, out + err

    return strike


def deploy_again(made: World, deploy: "subprocess.Popen[str]") -> None:
    """Deploy the same run once more: it is refused, and the first goes on."""
    config = str(made.laptop.project / "runs/job.json")
    again = made.laptop.deploy(config, "--remote", made.target, "--run-id", made.run_id)
    assert again.returncode == 2 and "is in use here" in again.stderr, again.stdout + again.stderr


MEMORY = Path("/sys/fs/cgroup/memory")
AS_ROOT, LIMITS_MEMORY = os.geteuid() == 0, os.access(MEMORY / "memory.usage_in_bytes", os.R_OK)
DISKS, CLOCKS = Setting(small_disks=True), Setting(clocks=True)
SLOW, LOSSY = Setting(delay_s=0.04), Setting(delay_s=0.04, loss=0.05)
STEPS = ("training", "pulling")
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("nothing, at +80 ms", lambda made, deploy: None, setting=SLOW),
        Fault("5 % of packets late, at +80 ms", lambda made, deploy: None, setting=LOSSY),
        Fault("link cut", lambda made, deploy: made.link.cut()),
        Fault("link down 2 s", go_down),
        Fault("link flapping", flap),
        Fault("sshd and its sessions killed", lose_sshd),
        Fault("kill -9 deploy", kill_deploy, follows=False),
        Fault("SIGSTOP deploy 2 s", pause_deploy),
        Fault("kill -9 deploy's rsync and ssh", kill_children),
        Fault("link cut at +80 ms", lambda made, deploy: made.link.cut(), setting=SLOW),
        Fault("attach beside deploy", attach_too, phases=("launched", *STEPS)),
        Fault("a byte of the mirror flipped", damage_mirror, follows=False, phases=STEPS),
        Fault(
            "kill -9 supervisor",
            on_host("supervise.supervisor", KILL),
            survives=False,
            phases=STEPS,
        ),
        Fault("SIGSTOP supervisor 2 s", on_host("supervise.supervisor", STOP), phases=STEPS),
        Fault("kill -9 trainer", on_host("worker.trainer", KILL), survives=False, phases=STEPS),
        Fault("SIGSTOP trainer 2 s", on_host("worker.trainer", STOP), phases=STEPS),
        Fault(
            "kill -9 the wrappers", on_host("supervise.window", KILL), survives=False, phases=STEPS
        ),
        Fault(
            "out of memory, by the kernel",
            run_out_of_memory,
            survives=False,
            phases=STEPS,
            possible=AS_ROOT and LIMITS_MEMORY,
        ),
        *(
            Fault(
                f"clock {where}: {hours:+} h",
                jump(side, f"{3600 * hours}"),
                phases=("launched", *STEPS),
                setting=CLOCKS,
                possible=COMPILER is not None,
            )
            for side, where in (("here", "of the laptop"), ("there", "of the host"))
            for hours in (3, -3)
        ),
        Fault(
            "the host's disk full for 2 s",
            fill("there"),
            survives=False,
            follows=False,
            phases=("uploading", "launched", *STEPS),
            setting=DISKS,
            possible=AS_ROOT,
        ),
        Fault(
            "the laptop's disk full for 2 s",
            fill("here"),
            follows=False,
            phases=("launched", *STEPS),
            setting=DISKS,
            possible=AS_ROOT,
        ),
        Fault("the host's rows and status torn", tear, phases=STEPS, waits=True),
        Fault("two attaches beside deploy", together("attach"), phases=("launched", *STEPS)),
        Fault(
            "a second deploy of it",
            deploy_again,
            phases=("registered", "uploading", "launched", "training"),
        ),
        Fault("two stops", together("stop"), survives=False, steps=60, phases=("launched", *STEPS)),
        Fault("reboot", reboot, survives=False, phases=("launched", *STEPS)),
        Fault(
            "stop by another command",
            stop_elsewhere,
            survives=False,
            steps=60,
            phases=("launched", *STEPS),
        ),
    )
}
PHASES: dict[str, Callable[[World], Any]] = {
    "registered": lambda made: (
        made.laptop.rollouts_home / f"registry/{made.run_id}.json"
    ).exists(),
    "uploading": lambda made: (made.there.path / "code").exists(),
    "launched": lambda made: made.there.status.exists(),
    "training": lambda made: read_jsonl(made.there.metrics),
    "pulling": lambda made: any(made.here.checkpoints.glob("sft/*")),
}
CELLS = [
    (name, phase) for name, fault in FAULTS.items() if fault.possible for phase in fault.phases
]


def run_cell(shared: Path, directory: Path, name: str, phase: str, *, pause_s: float = 0.0) -> str:
    """Run one cell, which strikes `pause_s` after the phase is reached. Returns how the run ended.

    Raises AssertionError for what does not hold.
    """
    fault, go = FAULTS[name], directory / "go"
    run_id = f"f{secrets.token_hex(4)}"
    with world(shared, directory, run_id, fault.setting) as made:
        env = {
            "STAND_IN_STEPS": str(fault.steps),
            "STAND_IN_STEP_S": "0.3",
            "STAND_IN_WAIT": str(go),
            "STAND_IN_CHECKPOINT_BYTES": "3000000",
        }
        config = str(write_config(made.laptop.project, env=env, host__disk_free_gib_min=0.0))
        log = (directory / "deploy.log").open("w")
        deploy = made.laptop.start(
            config,
            "--remote",
            made.target,
            "--run-id",
            run_id,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(lambda: PHASES[phase](made) or deploy.poll() is not None, phase)
            if not fault.waits:
                go.touch()
            time.sleep(pause_s)
            fault.strike(made, deploy)
            go.touch()
            first = [deploy.wait(timeout=400)]
        finally:
            deploy.kill()
            deploy.wait()
            log.close()
        said = (directory / "deploy.log").read_text()
        check_said(said)
        codes = first if fault.follows and first == [0] else [*first, *follow_to_end(made)]
        end = check_end(made, codes, survives=fault.survives)
        with contextlib.suppress(OSError):
            (MEMORY / run_id).rmdir()
        return end
