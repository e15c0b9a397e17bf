"""Start a run on this host: its files, then a detached tmux session with the supervisor in it, or a job of Slurm's.

    python3 -m rollouts.worker.launch < job.json          (in code/package, or in code/tree of a clone)

job.json is one object: {"config", "plan", "files": {"code/commit.txt": text, ...}, "secrets": {NAME: value},
"launch_id": text, "begins": {"metrics.jsonl": text, ...}, "resumed_from": {...} or null}, the last two of a run that
goes on from another's checkpoint; "group_key": text of a run on several hosts; "nodes": the plans of the other nodes of
a job of Slurm's. Prints one JSON line and exits 0:

    {"started": true, "run_id", "run_path"}
    {"started": false, "same": true, "reason"}      this very launch was made before: its run goes on
    {"started": false, "same": false, "reason"}     refused: another's run has the name, or what this one needs

An error goes to stderr, exit 1, and can be tried again. Standard library only.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.engines.keys import new_keys, shared_keys
from rollouts.run_dir import START_WAIT_S, LaunchPlan, RunDir, Status, observe
from rollouts.worker import tmux
from rollouts.worker.claims import one_at_a_time, taken
from rollouts.worker.environments import isolation
from rollouts.worker.processes import (
    POLL_S,
    SUPERVISOR_STAGE,
    SUPERVISOR_WINDOW,
    WINDOW_VARIABLE,
    end_marked,
    marked_processes,
)
from rollouts.worker.slurm_submit import SubmitError, submit
from rollouts.worker.supervise.window import window_command

SUPERVISOR_START_S = (
    START_WAIT_S - 15
)  # long: a host that works on much else is slow, and loses no run
# Of another run, where one launches from inside of it
MARK_VARIABLES = {run_dir.RUN_ID_VARIABLE, run_dir.RUN_PATH_VARIABLE, WINDOW_VARIABLE}
# Of the launcher's terminal and session, not of the machine. The run's processes get all else that the launcher had,
# less what would change what Python runs or installs (isolation.py).
SESSION_VARIABLES = {"TMUX", "TMUX_PANE", "TERM", "PWD", "OLDPWD", "SHLVL", "_", *MARK_VARIABLES}
SESSION_PREFIXES = ("SSH_",)


class LaunchError(Exception):
    """The run could not be started. The message is for the user."""


def launch(job: dict[str, Any]) -> dict[str, Any]:
    """Write the run's files and start it, once. Returns what to print.

    Raises LaunchError, TmuxError, or OSError for files that cannot be written; nothing runs then.
    """
    plan = LaunchPlan.from_json(job["plan"])
    run = RunDir(Path(plan.run_path))
    assert run_dir.valid_run_id(plan.run_id) and run.run_id == plan.run_id, (
        f"{plan.run_id} in {plan.run_path}"
    )
    if not Path("/proc/self/environ").exists():
        raise LaunchError(
            "this host has no /proc: runs need Linux, to know their own processes by it"
        )
    run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.path.chmod(0o700)
    run_dir.clean_up(Path(plan.home))
    with run_dir.launching(run):
        if run.lock.exists() or run.slurm_job.exists():
            reason = f"run {plan.run_id} was started before; it is {observe(run).state}"
            return {
                "started": False,
                "same": run_dir.read_launch_id(run) == job.get("launch_id"),
                "reason": reason,
            }
        if plan.slurm is None and tmux.has_session(plan.run_id):
            if not run.status.exists() or not set(tmux.pane_processes(plan.run_id)) & set(
                marked_processes(run)
            ):
                raise LaunchError(
                    f"a tmux session {plan.run_id!r} is there already, and not of this run. Choose another run name, or"
                    f" end that session (`tmux kill-session -t {plan.run_id}`)."
                )
            same = run_dir.read_launch_id(run) == job.get("launch_id")
            if same:
                _await_supervisor(run, plan)  # an earlier launch was cut off at this point
            return {
                "started": False,
                "same": same,
                "reason": f"run {plan.run_id} was started before",
            }
        if run.stop_asked.exists():
            run.stop_asked.unlink()
            raise LaunchError(
                f"`deploy stop {plan.run_id}` came before it was launched. `deploy attach {plan.run_id}` launches it"
                " all the same."
            )
        try:
            with one_at_a_time(Path(plan.home)):
                asks = plan.queue is None and plan.slurm is None
                # A job without an id comes from an older deploy, which looked before, and knows no such answer
                if job.get("launch_id") and asks and (reason := taken(plan)):
                    return {"started": False, "same": False, "reason": reason}
                for node in job.get("nodes", []):
                    _write_node(node, job)
                _write_files(run, plan, job)  # from here on others see this run as live
            if plan.slurm is None:
                _start_session(run, plan, job)
            else:
                submit(run, plan)
        except BaseException as error:
            run_dir.remove_transient(run)
            if isinstance(error, tmux.TmuxError | LaunchError | SubmitError):
                run_dir.write_json_atomic(
                    run.status, _status(plan, "failed", str(error), exit_code=1)
                )
            raise
    return {"started": True, "run_id": plan.run_id, "run_path": plan.run_path}


def _start_session(run: RunDir, plan: LaunchPlan, job: dict[str, Any]) -> None:
    command = window_command(plan.base_python, run, SUPERVISOR_STAGE, SUPERVISOR_WINDOW)
    hide = MARK_VARIABLES | set(job["secrets"])
    tmux.start_session(
        plan.run_id, SUPERVISOR_WINDOW, command, cwd=Path(plan.program_path), hide=hide
    )
    _await_supervisor(run, plan)


def _write_files(run: RunDir, plan: LaunchPlan, job: dict[str, Any]) -> None:
    inherited, left_out = own_environment(os.environ)
    by_slurm = plan.slurm is not None  # then a node's environment counts, and is looked at there
    if not by_slurm and (
        undeclared := set(left_out) - set(job["config"]["host"]["env"]) - set(job["secrets"])
    ):
        run_dir.append_event(run, "note", message=isolation.left_out_note(undeclared))
    secrets = {"inherited": inherited, "secrets": job["secrets"], "engine_keys": new_keys()}
    if plan.group is not None:
        group_key = job["group_key"]
        secrets |= {"group_key": group_key, "engine_keys": shared_keys(group_key)}
    run_dir.write_secrets(run, secrets, in_memory=not by_slurm)
    run_dir.make_reserve(run)
    launched = {"launch_id": job.get("launch_id"), "host": run_dir.host_identity()}
    if came := job.get("resumed_from"):
        launched["resumed_from"] = came
        message = f"goes on from {came['checkpoint']} of the run {came['run_id']}"
        run_dir.append_event(run, "note", message=message)
    run_dir.write_json_atomic(run.launch, launched)
    for name, text in job.get("begins", {}).items():
        assert name in run_dir.STREAMED_FILES or re.fullmatch(r"trackers/\w+\.json", name), (
            f"begins[{name!r}]: needs to be a file that grows, or how far a tracker is"
        )
        run_dir.write_text_atomic(run.path / name, text)
    run_dir.write_json_atomic(run.config, job["config"])
    run_dir.write_json_atomic(run.plan, job["plan"])
    for name, text in job["files"].items():
        parts = Path(name).parts
        assert parts[0] == "code" and ".." not in parts, (
            f"files[{name!r}]: needs to lie under code/"
        )
        run_dir.write_text_atomic(run.path / name, text)
    run.exit(SUPERVISOR_STAGE, SUPERVISOR_WINDOW).unlink(missing_ok=True)  # of a launch that failed
    status = _status(plan, "starting", "starting the supervisor", exit_code=None)
    if by_slurm:
        status = _status(plan, "queued", "Slurm gets its job", exit_code=None)
    run_dir.write_json_atomic(run.status, status)


def _write_node(plan: dict[str, Any], job: dict[str, Any]) -> None:
    """Write the files of another node's part of a run: its code is the first one's, and so are the rows."""
    run = RunDir(Path(plan["run_path"]))
    run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.code.unlink(missing_ok=True)  # of a launch that failed
    run.code.symlink_to(os.path.relpath(run.first.code, run.path))
    _write_files(run, LaunchPlan.from_json(plan), {**job, "plan": plan, "files": {}, "begins": {}})


def own_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return what a run's processes get of a machine's environment, and the names that are left out of it."""
    machines = {
        name: value
        for name, value in environment.items()
        if name not in SESSION_VARIABLES and not name.startswith(SESSION_PREFIXES)
    }
    return isolation.split(machines)


def _status(
    plan: LaunchPlan, state: run_dir.State, message: str, *, exit_code: int | None
) -> Status:
    now = time.time()
    return Status(
        run_id=plan.run_id,
        experiment_name=plan.experiment_name,
        state=state,
        stage=None,
        message=message,
        started_at=now,
        updated_at=now,
        exit_code=exit_code,
    )


def _await_supervisor(run: RunDir, plan: LaunchPlan) -> None:
    """Return once the supervisor has taken its lock: from then on files tell the rest.

    Raises LaunchError, and nothing is left that could start later, without what a failed launch removes.
    """
    deadline = time.monotonic() + SUPERVISOR_START_S
    while not _is_supervised(run):
        gone = not tmux.has_session(run.run_id)  # it ends with its only window
        if _is_supervised(run):
            return
        if gone or time.monotonic() > deadline:
            tmux.kill_session(run.run_id)
            end_marked(run, None, grace_s=0)
            said = "\n".join(run_dir.tail_lines(run.log(SUPERVISOR_WINDOW), 20)) or "(nothing)"
            how = "ended at once" if gone else f"did not start within {SUPERVISOR_START_S:g} s"
            raise LaunchError(
                f"the supervisor ({plan.base_python} -m rollouts.worker.supervise.supervisor, in {plan.program_path})"
                f" {how}. It needs Python >= 3.10 and the synced code there. It said:\n{said}"
            )
        time.sleep(POLL_S)


def _is_supervised(run: RunDir) -> bool:
    """Under a supervisor, or past it: one that was quick has ended already."""
    status = run_dir.read_status(run)
    return run_dir.is_live(run) or (status is not None and status.state != "starting")


def _describe(error: OSError, run_path: str) -> str:
    existing = Path(run_path)
    while not existing.exists():
        existing = existing.parent
    free_mib = shutil.disk_usage(existing).free / 2**20
    return f"cannot write {error.filename or run_path}: {error.strerror} ({free_mib:.0f} MiB free there)"


def main() -> None:
    try:
        job = json.load(sys.stdin)
    except ValueError as error:
        sys.exit(f"error: the job on stdin is not JSON: {error}")
    try:
        print(json.dumps(launch(job)), flush=True)
    except (LaunchError, SubmitError, tmux.TmuxError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {_describe(error, job['plan']['run_path'])}")


if __name__ == "__main__":
    main()
