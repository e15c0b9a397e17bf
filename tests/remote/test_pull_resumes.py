"""A pull goes on where it was, whatever ended it; and brings what was asked for. Over a real sshd, behind a link that
is cut at random places and counts every byte."""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import manifest_problems
from rollouts.remote.errors import DeployError
from rollouts.remote.run.wanted import ToBring
from rollouts.run_dir import RunDir
from tests.remote.hosts import Host, Laptop, descendants, wait_for, write_config
from tests.remote.link import Link, link
from tests.remote.test_whole_runs import mirror

# ssh loses up to 2 MB that are under way at each cut: of 60 MB, five cuts stay below the fifth that is allowed
SIZE = 60_000_000
CHECKPOINT = "checkpoints/sft/step_000003"


@pytest.fixture
def ended(laptop: Laptop, make_host: Callable[..., Host]) -> Host:
    """A host with the run `big`, which has ended; its last checkpoint has 60 MB. Nothing of it was pulled."""
    host = make_host()
    config = str(
        write_config(
            laptop.project, output__mode="sft", env={"STAND_IN_CHECKPOINT_BYTES": str(SIZE)}
        )
    )
    assert (
        laptop.deploy(config, "--remote", host.target, "--run-id", "big", "--detach").returncode
        == 0
    )
    run = RunDir(host.run_path("big"))
    wait_for(lambda: run.exit("run", "supervisor").exists(), "the run's end")
    return host


def rsyncs_of(pid: int) -> list[int]:
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "rsync":
                found.append(child)
    return found


def signalled(pids: list[int], number: int) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, number)


def kill_at_once(pids: list[int]) -> None:
    """kill -9, so that none of them sees another's end."""
    signalled(pids, signal.SIGSTOP)
    signalled(pids, signal.SIGKILL)


def pulling(laptop: Laptop, way: Link, target: str, down_bytes: int) -> "subprocess.Popen[str]":
    """Return a pull that is under way; the link went down after so many bytes."""
    way.held_at = down_bytes
    process = laptop.start(
        "pull", "big", "--remote", target, "--only", "latest", stdout=subprocess.DEVNULL
    )
    wait_for(lambda: way.is_down or process.poll() is not None, f"{down_bytes} bytes")
    assert process.poll() is None
    return process


def check_came(laptop: Laptop, done: int, came: int) -> None:
    assert done == 0
    assert manifest_problems(mirror(laptop, "big").path / CHECKPOINT) == ()
    assert came <= 1.2 * SIZE, f"{came / SIZE:.2f} x"


@pytest.mark.parametrize("fault", ["link", "rsync"])
def test_a_checkpoint_goes_on_where_it_was(fault: str, laptop: Laptop, ended: Host) -> None:
    """Goal: the link cut five times at random places, and kill -9 of rsync with another cut after it: each byte comes
    about once, and what has a name is whole. Red with --partial: an rsync that is killed keeps no file, 1.6 x."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    with link(ended.port) as way:
        target = laptop.know_by(ended, way.port)
        way.cut_at = sorted(rng.randrange(SIZE // 20, SIZE) for _ in range(5))
        if fault == "rsync":
            way.cut_at = [rng.randrange(SIZE // 2, SIZE)]
            process = pulling(laptop, way, target, rng.randrange(SIZE // 4, SIZE // 2))
            kill_at_once(rsyncs_of(process.pid))
            way.set_down(False)
            process.communicate()
        cuts = len(way.cut_at) + way.cuts
        done = laptop.deploy("pull", "big", "--remote", target, "--only", "latest")
        assert way.cuts == cuts, done.stderr
        check_came(laptop, done.returncode, way.down_bytes)


def test_a_pull_waits_for_the_rsync_of_one_that_was_killed(laptop: Laptop, ended: Host) -> None:
    """Goal: kill -9 of deploy leaves its rsync, which goes on; the next pull begins where that ends. Red without the
    lock that rsync holds: both brought the rest, 1.75 x."""
    with link(ended.port) as way, link(ended.port) as other:
        process = pulling(laptop, way, laptop.know_by(ended, way.port), SIZE // 4)
        left = rsyncs_of(process.pid)
        process.kill()
        process.communicate()
        assert left and all(Path(f"/proc/{pid}").exists() for pid in left)
        again = laptop.start(
            "pull", "big", "--remote", laptop.know_by(ended, other.port), "--only", "latest"
        )
        part = mirror(laptop, "big").path / "checkpoints/sft/.step_000003.part"
        held = str(part.stat().st_ino)
        wait_for(
            lambda: is_waited_for(held) or other.down_bytes > SIZE // 2,
            "the second one at the directory",
        )
        way.set_down(False)
        out, err = again.communicate(timeout=250)
        wait_for(
            lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in left),
            "the first rsync's end",
        )
        check_came(laptop, again.returncode, way.down_bytes + other.down_bytes)
        assert "Traceback" not in out + err


def is_waited_for(inode: str) -> bool:
    return any(
        "->" in line and line.split()[6].endswith(f":{inode}")
        for line in Path("/proc/locks").open()
    )


def test_nothing_is_written_through_a_hard_link(
    laptop: Laptop, ended: Host, tmp_path: Path
) -> None:
    """Goal: where the hidden directory has a file with another name elsewhere, that other file stays as it is. Red with
    --inplace alone: rsync wrote into both."""
    other = tmp_path / "other.bin"
    other.write_bytes(b"another run's")
    partial = mirror(laptop, "big").path / "checkpoints/sft/.step_000003.part"
    partial.mkdir(parents=True)
    os.link(other, partial / "model.safetensors")
    (partial / "config.json").symlink_to(other)
    assert laptop.deploy("pull", "big", "--only", "latest").returncode == 0
    assert other.read_bytes() == b"another run's"
    assert manifest_problems(mirror(laptop, "big").path / CHECKPOINT) == ()


def test_what_a_pull_brings(laptop: Laptop, ended: Host) -> None:
    """Goal: --no-checkpoints and --only latest leave the rest on the host, and say so with the command that brings it,
    also while a run is followed; --bwlimit reaches rsync."""
    with_none = laptop.json("pull", "big", "--no-checkpoints")
    assert with_none["checkpoints"] == [] and len(with_none["left"]) == 2
    assert (
        "`deploy pull big` brings" in with_none["notes"][0]
        and "sft/step_000001" in with_none["notes"][0]
    )
    followed = laptop.deploy("attach", "big", "--only", "latest", "--bwlimit", "2G")
    assert followed.returncode == 0 and "`deploy pull big` brings" in followed.stdout
    assert "sft/step_000001" in followed.stdout
    here = mirror(laptop, "big")
    assert sorted(path.name for path in (here.checkpoints / "sft").iterdir()) == [
        "latest",
        "step_000003",
    ]
    assert '"complete": false' in (here.path / "mirror.json").read_text()
    rest = laptop.json("pull", "big")
    assert len(rest["checkpoints"]) == 2 and rest["left"] == [] and rest["notes"] == []
    assert '"complete": true' in (here.path / "mirror.json").read_text()
    wrong = laptop.deploy("pull", "big", "--bwlimit", "fast")
    assert (
        wrong.returncode == 2
        and "--bwlimit fast: not a rate" in wrong.stderr
        and "2.5M" in wrong.stderr
    )


@pytest.mark.parametrize(
    ("text", "kib"),
    [("500", 500), ("500K", 500), ("2.5m", 2560), ("1MB", 977), ("10MiB", 10240), ("2048b", 2)],
)
def test_rates(text: str, kib: int) -> None:
    """Goal: rsync's words for a rate, in the form that every rsync knows. Red with the text handed on: macOS's rsync
    takes whole numbers alone."""
    wanted = ToBring.parse(no_checkpoints=False, only=None, bwlimit=text)
    assert wanted.rsync_options == (f"--bwlimit={kib}",)


@pytest.mark.parametrize(
    "options",
    [
        {"bwlimit": "-1"},
        {"bwlimit": "0"},
        {"bwlimit": "1Q"},
        {"bwlimit": ""},
        {"bwlimit": "1 M"},
        {"only": "best"},
        {"only": "latest", "no_checkpoints": True},
    ],
)
def test_what_no_pull_means(options: dict[str, Any]) -> None:
    """Goal: a rate or a choice that means nothing is an error with what is allowed. Red with 0 handed to rsync, for
    which it is no limit."""
    with pytest.raises(DeployError, match=r"--bwlimit|--only"):
        ToBring.parse(**{"no_checkpoints": False, "only": None, "bwlimit": None, **options})


def test_the_latest_of_each_stage() -> None:
    """Goal: steps are numbers, and each stage has its last. Red with names compared as text."""
    paths = [
        f"checkpoints/{name}" for name in ("sft/step_999999", "sft/step_1000000", "rl/step_000004")
    ]
    assert ToBring("latest").choose(paths) == (paths[1:], paths[:1])
    assert ToBring("none").choose(paths) == ([], paths)
