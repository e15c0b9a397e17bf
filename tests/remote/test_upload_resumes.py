"""An upload goes on where it was, whatever ended it. Over a real sshd, behind a link that counts every byte."""

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from rollouts.run_dir import RunDir
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.link import Link, link
from tests.remote.test_pull_resumes import is_waited_for, kill_at_once, rsyncs_of, signalled
from tests.remote.test_whole_runs import quiet

# ssh loses up to 2 MB that are under way at each cut: of 45 MB, three cuts stay below the fifth that is allowed
SIZE = 45_000_000


@pytest.fixture
def way(laptop: Laptop, make_host: Callable[..., Host]) -> Iterator[tuple[Host, Link]]:
    """A host, and the link to it; the laptop's project has a file of 45 MB."""
    (laptop.project / "big.bin").write_bytes(os.urandom(SIZE))
    host = make_host()
    with link(host.port) as made:
        yield host, made


def sending(laptop: Laptop, host: Host, made: Link, up_bytes: int) -> "subprocess.Popen[str]":
    """Return a deploy that is sending the code; the link went down after so many bytes."""
    made.down_at = up_bytes
    config = str(write_config(laptop.project, output__mode="sft"))
    process = laptop.start(
        config, "--remote", laptop.know_by(host, made.port), "--run-id", "up", "--detach"
    )
    wait_for(lambda: made.is_down or process.poll() is not None, f"{up_bytes} bytes")
    assert process.poll() is None
    return process


def check_came(laptop: Laptop, host: Host, came: int) -> None:
    """What was launched is what lies here, and each byte went about once."""
    run = RunDir(host.run_path("up"))
    quiet("up")  # a run that goes on writes files there, under hidden names at first
    assert (run.code_tree / "big.bin").read_bytes() == (laptop.project / "big.bin").read_bytes()
    assert list(run.code.glob(".*")) == [] and run.status.exists()
    assert came <= 1.2 * SIZE, f"{came / SIZE:.2f} x"


@pytest.mark.parametrize("fault", ["link", "rsync here", "rsync there"])
def test_an_upload_goes_on_by_itself(fault: str, laptop: Laptop, way: tuple[Host, Link]) -> None:
    """Goal: the link cut three times, or kill -9 of either rsync: deploy makes the connection again, and each byte goes
    about once. Red with --partial: the host's rsync that is killed keeps no file."""
    (host, made), rng = way, random.Random(seed := random.SystemRandom().randrange(1 << 32))
    print(f"seed={seed}")
    process = sending(laptop, host, made, rng.randrange(SIZE // 4, SIZE // 2))
    if fault == "link":
        for part in (0.6, 0.8, None):
            made.cut()
            made.down_at = part and int(part * SIZE)
            made.set_down(False)
            wait_for(lambda part=part: part is None or made.is_down, f"{part} of it")
    else:
        side = process if fault == "rsync here" else host.process
        assert side is not None
        kill_at_once(rsyncs_of(side.pid))
        made.set_down(False)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0 and "reconnect: " in out + err, out + err
    check_came(laptop, host, made.up_bytes)


def test_an_upload_goes_on_after_kill_9_of_deploy(laptop: Laptop, way: tuple[Host, Link]) -> None:
    """Goal: kill -9 of deploy leaves its rsync, until that has something to tell; attach waits for its end, and sends
    only what is missing, after a cut link too. Red without the lock: both sent all of it."""
    host, made = way
    process = sending(laptop, host, made, SIZE // 4)
    left = rsyncs_of(process.pid)
    signalled(left, signal.SIGSTOP)
    made.set_down(False)
    process.kill()
    process.communicate()
    (record,) = (laptop.rollouts_home / "registry").glob("up.*/")
    inode, sent = str(record.stat().st_ino), made.up_bytes
    again = laptop.start("attach", "up")
    wait_for(lambda: is_waited_for(inode) or again.poll() is not None, "attach at the lock")
    assert made.up_bytes < sent + SIZE // 8, "it sends beside the one that is there"
    made.down_at = SIZE // 2
    signalled(left, signal.SIGCONT)
    wait_for(lambda: made.is_down or again.poll() is not None, "half of it")
    made.cut()
    made.set_down(False)
    out, err = again.communicate(timeout=250)
    assert again.returncode == 0, out + err
    assert "another command is sending this run: waiting for its end" in out + err
    check_came(laptop, host, made.up_bytes)
