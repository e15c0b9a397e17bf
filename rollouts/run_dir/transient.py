"""What must not outlive a run: its secrets, and files in memory."""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from rollouts.plain_files import read_plain
from rollouts.run_dir.files import write_json_atomic
from rollouts.run_dir.layout import RunDir, StageName
from rollouts.run_dir.liveness import launching, observe
from rollouts.run_dir.records import host_identity, other_host, read_status
from rollouts.run_dir.slurm_job import read_slurm_job

WHOSE = "run.json"  # beside secrets in memory: whose they are, for when the run's directory is gone


def write_secrets(run: RunDir, value: dict[str, Any], *, in_memory: bool = True) -> None:
    """Write the run's secrets, 0600: on a tmpfs where this machine has one, else into the run directory.

    Not `in_memory`: another machine, which shares the directory, reads them.
    """
    if in_memory and _wrote_into_memory(run, value):
        return
    run.secrets.unlink(missing_ok=True)
    write_json_atomic(run.secrets, value, mode=0o600)


def _wrote_into_memory(run: RunDir, value: dict[str, Any]) -> bool:
    memory = run.secrets_in_memory
    try:
        memory.parent.mkdir(mode=0o700, exist_ok=True)
        found = memory.parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "made by another user", str(memory.parent))
        write_json_atomic(
            memory.with_name(WHOSE),
            {"run_path": str(run.path), "host": host_identity()},
            mode=0o600,
        )
        write_json_atomic(memory, value, mode=0o600)
        run.secrets.unlink(missing_ok=True)
        run.secrets.symlink_to(memory)
    except OSError:  # no tmpfs there, a full one, or a file of another user's in its place
        return False
    return True


def remove_transient(run: RunDir, *, job_is_over: bool = False) -> None:
    """Remove what must not outlive a run's processes: its secrets, weights that a killed trainer left in memory, and
    files by which its processes found each other. Secrets stay where Slurm may start its job again, unless that
    `job_is_over`."""
    if job_is_over or not _may_start_again(run):
        _remove_secrets(run)
    remove_meetings(run)
    for file in (
        run.reserve,
        run.stop_asked,
        run.trackers_end,
        *run.path.glob(run.smoke_report("*").name),
    ):
        file.unlink(missing_ok=True)


def _may_start_again(run: RunDir) -> bool:
    """Return whether Slurm may start the run's job again, in which it goes on then."""
    try:
        job, status = read_slurm_job(run), read_status(run)
        spec = json.loads(read_plain(run.plan)).get("slurm")
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    ended = job is None or job.has_ended or status is None or status.state in ("done", "failed")
    return not ended and isinstance(spec, dict) and spec.get("requeue") is True


def _remove_secrets(run: RunDir) -> None:
    places = {run.secrets_in_memory}
    if run.secrets.is_symlink():  # the directory may go by another name now
        places.add(Path(os.readlink(run.secrets)))
    run.secrets.unlink(missing_ok=True)
    for place in places:
        if place.match("/dev/shm/rollouts-secrets-*/secrets.json"):
            with contextlib.suppress(OSError):  # gone, or another user's of that name
                shutil.rmtree(place.parent)
    for file in _left_secrets(run):
        file.unlink(missing_ok=True)


def remove_meetings(run: RunDir) -> None:
    """Remove what a stage's processes share while they run: where they found each other, and weights in memory."""
    stages = get_args(StageName)
    meetings = [place(stage) for place in (run.rendezvous, run.ranks) for stage in stages]
    for file in (*meetings, run.heeds_stop, *run.buckets_in_memory()):
        file.unlink(missing_ok=True)
    shutil.rmtree(run.weights_in_memory, ignore_errors=True)


def _left_secrets(run: RunDir) -> list[Path]:
    """Return what a writer that was killed left of the secrets."""
    directories = (run.path, run.secrets_in_memory.parent)
    return [file for directory in directories for file in directory.glob(".secrets.json.*.tmp")]


def clean_up(home: Path) -> None:
    """Remove what runs under `home` left that died without their own end: a reboot, or SIGKILL of everything.

    Also of runs whose directory was removed since: what they have in memory would stay until the next boot.
    """
    for path in home.glob("runs/*"):
        with contextlib.suppress(OSError):  # another user's, or removed meanwhile: it does no harm
            for run in (RunDir(path), *RunDir(path).nodes_runs()):
                _clean_up_run(run)
    for run in _removed_runs(home):
        with contextlib.suppress(OSError):
            remove_transient(run)


def _clean_up_run(run: RunDir) -> None:
    places = (run.secrets, run.secrets_in_memory.parent)
    if any(map(os.path.lexists, places)) or _left_secrets(run):
        with launching(run, wait=False) as alone:
            if alone and other_host(run) is None and not observe(run).live:
                remove_transient(run)


def _removed_runs(home: Path) -> Iterator[RunDir]:
    """Return runs of this home and machine that have files in memory, and no directory any more."""
    for file in Path("/dev/shm").glob(f"rollouts-secrets-{os.getuid()}-*/{WHOSE}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            whose = json.loads(read_plain(file))
            run = RunDir(Path(whose["run_path"]))
            # containers may share /dev/shm
            ours = whose["host"] == host_identity() and run.path.parent == home / "runs"
            if (
                ours
                and run.secrets_in_memory.parent == file.parent
                and not os.path.lexists(run.path)
            ):
                yield run
