"""Do what the plan says: send the code, launch. Decides nothing, and can be done again after a kill at any moment."""

import json
import os
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.host.read_answer import MalformedError, checked, malformed, read_answer
from rollouts.remote.host.rsync import disk_full
from rollouts.remote.host.transport import Transport
from rollouts.remote.package import installed
from rollouts.remote.repository import list_files, read_recorded_tree
from rollouts.remote.run.place import place_all
from rollouts.remote.run.registry import RunEntry, begins
from rollouts.remote.run.sync_code import CodePlace, sync_code
from rollouts.view.reporter import Say

LAUNCH_TIMEOUT_S = 60
PACKAGE_LINK = ".rollouts-package"  # beside the links to projects' last trees


def execute(entry: RunEntry, config: Config, transport: Transport, path: str, say: Say) -> None:
    """Bring the run of `entry` to life on its host; `path` is the PATH it gets there. Raises DeployError.

    Done twice, the second time changes nothing. All that is used is this machine's own record: what lies on the host is
    the code that it tells of.
    """
    send(entry, transport, say)
    launch_there(entry, config, transport, path, say)


def send(entry: RunEntry, transport: Transport, say: Say) -> None:
    """Bring the run's code, and the checkpoints that it goes on from, to its host. Raises DeployError."""
    launch = entry.launch
    if launch.package_path:
        _sync_package(entry, transport, say)
    root = Path(entry.repository)
    sync_code(
        transport,
        CodePlace(home=entry.home, run_path=entry.run_path, project=root.name, launch_id=entry.launch_id),
        root=root,
        files=tuple(list_files(root)),
        python=launch.base_python,
        expected=read_recorded_tree(entry.record),
        say=say,
    )
    place_all(entry, transport, launch.base_python, say)


def launch_there(entry: RunEntry, config: Config, transport: Transport, path: str, say: Say) -> None:
    """Start the run on its host, which has its code. Raises DeployError."""
    launch = entry.launch
    say("launch", f"tmux session {entry.run_id}")
    code = entry.record.code
    job = {
        "config": config.to_json(),
        "plan": json.loads(entry.plan_text),
        "files": {f"code/{file.name}": read_plain(file).decode() for file in sorted(code.iterdir()) if file.is_file()},
        "secrets": read_secrets(config),
        "launch_id": entry.launch_id,
        "begins": begins(entry),
        "resumed_from": entry.resumed_from,
        **({"group_key": entry.group_key} if launch.group is not None else {}),
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
            found=done.err.removeprefix("error: ")[-3000:] or f"exit code {done.returncode}, no message",
        )
    _heed(entry, read_launch_answer(entry.target, done.out))


def _sync_package(entry: RunEntry, transport: Transport, say: Say) -> None:
    """Bring rollouts itself to `code/package`, as it was when the run was planned."""
    package = installed()
    place = CodePlace(
        home=entry.home, run_path=entry.run_path, project=PACKAGE_LINK, launch_id=entry.launch_id, name="package"
    )
    sync_code(
        transport,
        place,
        root=package.root,
        files=package.files,
        python=entry.launch.base_python,
        expected=read_recorded_tree(entry.record, entry.record.package_manifest),
        say=say,
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
            f"not set here: {', '.join(missing)}.", needed=f"host.secrets={config.host.secrets}", fix="export them"
        )
    return {name: os.environ[name] for name in config.host.secrets}
