"""Do what the plan says: send the code, launch. Decides nothing, and can be done again after a kill at any moment."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError, TransportError, UnreachableError
from rollouts.remote.git import list_files
from rollouts.remote.host.read_answer import MalformedError, checked, malformed, read_answer
from rollouts.remote.host.rsync import disk_full
from rollouts.remote.host.transport import Transport
from rollouts.remote.package import installed
from rollouts.remote.repository import read_recorded_tree
from rollouts.remote.run.connection import RetryPolicy, RunConnection, with_retries
from rollouts.remote.run.place import place_all
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.resumable import begins
from rollouts.remote.run.sync_code import CodePlace, Upload, sync_code
from rollouts.run_dir import RunDir
from rollouts.view.reporter import Say

LAUNCH_TIMEOUT_S = 120  # a supervisor may be slow to start
SEND_AGAIN_S = 300.0  # in which no try brings a byte there: then its user is told
WITHDRAW_TIMEOUT_S = 60
PACKAGE_LINK = ".rollouts-package"  # beside the links to projects' last trees


def execute(entry: RunEntry, config: Config, transport: Transport, path: str, say: Say) -> None:
    """Bring the run of `entry` to life on its host; `path` is the PATH it gets there. Raises DeployError.

    Done twice, the second time changes nothing. All that is used is this machine's own record: what lies on the host is
    the code that it tells of.
    """
    send(entry, transport, say)
    launch_there(entry, config, transport, path, say)


def send(entry: RunEntry, transport: Transport, say: Say) -> None:
    """Bring the run's code, and the checkpoints that it goes on from, to its host. Raises DeployError.

    A lost connection is made again, for as long as that brings something.
    """
    with _sending_alone(entry, say) as lock:
        upload = Upload(keep_open=(lock,))
        connection = RunConnection(entry, entry.launch.base_python, transport)
        try:
            with_retries(
                lambda: _send(entry, transport, say, upload),
                connection,
                say,
                RetryPolicy(total_s=SEND_AGAIN_S),
                came=lambda: upload.sent_bytes,
            )
        except UnreachableError as error:
            raise TransportError(
                f"{entry.target}: the code could not be sent within {SEND_AGAIN_S:.0f} s.",
                lost=True,
                found=error.problems[0].found,
                fix=f"deploy attach {entry.run_id}: it goes on with what was sent",
            ) from None


def _send(entry: RunEntry, transport: Transport, say: Say, upload: Upload) -> None:
    launch = entry.launch
    if launch.package_path:
        _sync_package(entry, transport, say, upload)
    root = Path(entry.repository)
    sync_code(
        transport,
        CodePlace(
            home=entry.home, run_path=entry.run_path, project=root.name, launch_id=entry.launch_id
        ),
        root=root,
        files=tuple(list_files(root)),
        python=launch.base_python,
        expected=read_recorded_tree(entry.record),
        say=say,
        upload=upload,
    )
    place_all(entry, transport, launch.base_python, say, upload)


@contextlib.contextmanager
def _sending_alone(entry: RunEntry, say: Say) -> Iterator[int]:
    """Wait until no other command of this machine, and no rsync that a killed one left, sends this run.

    Yield the lock's descriptor, for this one's own rsyncs.
    """
    descriptor = os.open(entry.record.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("sync", "another command is sending this run: waiting for its end")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def withdraw_stop(entry: RunEntry, transport: Transport) -> None:
    """Let a stop that was asked for before the run was launched on this host count no more."""
    asked = str(RunDir(Path(entry.run_path)).stop_asked)
    transport.run(["rm", "-f", asked], timeout_s=WITHDRAW_TIMEOUT_S)


def launch_there(
    entry: RunEntry, config: Config, transport: Transport, path: str, say: Say
) -> None:
    """Start the run on its host, which has its code. Raises DeployError."""
    launch = entry.launch
    say("launch", f"tmux session {entry.run_id}" if launch.slurm is None else "a job for Slurm")
    code = entry.record.code
    job = {
        "config": config.to_json(),
        "plan": json.loads(entry.plan_text),
        "files": {
            f"code/{file.name}": read_plain(file).decode()
            for file in sorted(code.iterdir())
            if file.is_file()
        },
        "secrets": read_secrets(config),
        "launch_id": entry.launch_id,
        "begins": {} if entry.rank else begins(entry),  # the first host writes rows
        "resumed_from": entry.resumed_from,
        **({"group_key": entry.group_key} if launch.group is not None else {}),
        "nodes": _plans_of_nodes(entry),
    }
    done = transport.run(
        ["env", f"PATH={path}", launch.base_python, "-E", "-m", "rollouts.worker.launch"],
        stdin=json.dumps(job).encode(),
        cwd=launch.program_path,
        timeout_s=LAUNCH_TIMEOUT_S,
    )
    if "No space left on device" in done.err:
        raise disk_full(entry.target, done.err)
    if done.returncode != 0:
        raise DeployError(
            f"{entry.target}: the run could not be launched.",
            found=done.err.removeprefix("error: ")[-3000:]
            or f"exit code {done.returncode}, no message",
        )
    _heed(entry, read_launch_answer(entry.target, done.out))


def _plans_of_nodes(entry: RunEntry) -> list[dict[str, Any]]:
    """Return the plans of the other nodes of a job of Slurm's, which are launched with the first one."""
    if entry.launch.slurm is None:
        return []
    ranks = range(1, len(entry.others) + 1)
    return [json.loads(entry.on(rank).plan_text) for rank in ranks]


def _sync_package(entry: RunEntry, transport: Transport, say: Say, upload: Upload) -> None:
    """Bring rollouts itself to `code/package`, as it was when the run was planned."""
    package = installed()
    place = CodePlace(
        home=entry.home,
        run_path=entry.run_path,
        project=PACKAGE_LINK,
        launch_id=entry.launch_id,
        name="package",
    )
    sync_code(
        transport,
        place,
        root=package.root,
        files=package.files,
        python=entry.launch.base_python,
        expected=read_recorded_tree(entry.record, entry.record.package_manifest),
        say=say,
        upload=upload,
    )


def read_launch_answer(target: str, out: str) -> dict[str, Any]:
    """Return the launcher's last word. Raises DeployError for none: then it is not known whether a run started."""
    answer = read_answer(target, "the launch", out, {"started": bool}, started=True)
    more = {name: kind for name, kind in (("same", bool), ("reason", str)) if name in answer}
    try:
        return checked(answer, more)
    except MalformedError as error:
        raise malformed(target, "the launch", str(error), out, started=True) from None


def _heed(entry: RunEntry, answer: dict[str, Any]) -> None:
    """Raise DeployError for a launch that the host refused; one that was made before goes on."""
    if answer["started"] or answer.get("same", True):  # a tree of an older version does not tell
        return
    raise DeployError(
        f"{entry.run_id} was not started: the host has given to another run what it needs.",
        found=f"in use on {entry.target}: {answer.get('reason')}",
        fix="choose another --run-id, other GPUs or ports (engine.sglang_port=0 takes free ones), or wait with --wait",
    )


def read_secrets(config: Config) -> dict[str, str]:
    """Return the values of host.secrets, from this process's environment. Raises DeployError for missing ones."""
    missing = [name for name in config.host.secrets if not os.environ.get(name)]
    if missing:
        raise DeployError(
            f"not set here: {', '.join(missing)}.",
            needed=f"host.secrets={config.host.secrets}",
            fix="export them",
        )
    return {name: os.environ[name] for name in config.host.secrets}
