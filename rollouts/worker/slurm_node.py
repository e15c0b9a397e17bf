"""The first process of a run on a node that Slurm gave it: it makes the plan fit the node, and becomes the supervisor.

    srun … python3 -E -m rollouts.worker.slurm_node <run_path>

What only the node knows is put into the run's files here: which machine it is, its environment after `module load`,
the GPUs that Slurm gave, free ports; on several nodes where they meet. A job that Slurm starts again goes on here, too.
Standard library only.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.machine.free_ports import free_ports
from rollouts.plain_files import read_plain
from rollouts.run_dir import GPUS_VARIABLE, LaunchPlan, RunDir
from rollouts.worker.environments import isolation
from rollouts.worker.launch import own_environment
from rollouts.worker.processes import SUPERVISOR_STAGE, SUPERVISOR_WINDOW
from rollouts.worker.slurm_places import PlaceError, hear, is_public, name_of, own_place, tell
from rollouts.worker.supervise.begun import ended_stages
from rollouts.worker.supervise.window import window_command

JOB_WAIT_S = 60.0  # for slurm.json: a job may start before its submitter has written that down
POLL_S = 0.1
VISIBLE = "CUDA_VISIBLE_DEVICES"
GIVEN = (VISIBLE, "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # where Slurm says which GPUs it gave


class NodeError(Exception):
    """The run cannot start on this node. The message is for the user."""


def prepare(first: RunDir, environment: dict[str, str]) -> tuple[RunDir, LaunchPlan]:
    """Make the files of this node's part of the run fit it; return that, and its plan. Raises NodeError."""
    job_id, rank = environment.get("SLURM_JOB_ID", ""), int(environment.get("SLURM_NODEID") or 0)
    restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
    run = first.on_node(rank) if rank else first
    _await_own_job(first, job_id)
    several, attempt = bool(rank or first.nodes_runs()), f"{job_id}.{restarts}"
    try:
        fitted, own = _own_part(first, run, environment, starts_again=restarts > 0)
    except (NodeError, PlaceError, OSError, ValueError, TypeError, KeyError) as error:
        if several:  # the others need not wait for this one
            tell(first, rank, attempt, name_of(environment), {}, error=str(error))
        raise NodeError(str(error)) from error
    if several:
        tell(first, rank, attempt, name_of(environment), own)
        names, own = hear(first, len(fitted["group"]["hosts"]), attempt)
        for host, name in zip(fitted["group"]["hosts"], names, strict=True):
            host["name"] = name
    fitted = with_values(fitted, own)
    fitted["slurm"]["restarts"] = restarts
    run_dir.write_json_atomic(run.plan, fitted)
    plan = LaunchPlan.from_json(fitted)
    _write_files(run, plan, environment)
    return run, plan


def _own_part(
    first: RunDir, run: RunDir, environment: dict[str, str], *, starts_again: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the JSON of this node's plan with its GPUs, and what it gets in place of its stand-ins. Raises NodeError,
    PlaceError, or what reading its files raises."""
    plan = _submitted(run)
    if plan.slurm is None:
        raise NodeError(f"{run.plan} does not say how this job runs.")
    if starts_again or run.lock.exists():
        _may_go_on(first, plan, environment.get("SLURM_JOB_ID", ""))
        put_exits_aside(run)
    fitted = with_gpus(plan.to_json(), given_gpus(environment), plan.slurm.gpus)
    return fitted, own_values(plan, environment)


def _submitted(run: RunDir) -> LaunchPlan:
    """Return the plan as Slurm got it, which is kept for when it starts the job again."""
    if not run.submitted_plan.exists():
        run_dir.write_text_atomic(run.submitted_plan, read_plain(run.plan).decode())
    return LaunchPlan.from_json(json.loads(read_plain(run.submitted_plan)))


def _may_go_on(first: RunDir, plan: LaunchPlan, job_id: str) -> None:
    """Raise NodeError where a run that began before may not go on in this job."""
    assert plan.slurm is not None
    status = run_dir.read_status(first)
    if status is not None and status.state == "done":
        raise NodeError(f"the run is done, and Slurm started job {job_id} again: nothing is left.")
    if not plan.slurm.requeue:
        raise NodeError(
            f"the run began before, and Slurm started job {job_id} again: it is not run twice."
            f" `deploy resume {first.run_id}` goes on from its last checkpoint; with --requeue in the options file the"
            " job itself does."
        )
    if not first.secrets.exists():
        raise NodeError(
            f"the run began before, and its secrets are gone: `deploy resume {first.run_id}` goes on."
        )


def put_exits_aside(run: RunDir) -> None:
    """Rename the exit records of what did not come to its end, so that the next life has none until it ends."""
    ended = ended_stages(run.first)
    for record in sorted(run.exit("x", "x").parent.glob("*.json")):
        stem = record.name.removesuffix(".json")
        if ".life-" in stem or any(stem.startswith(f"{stage}-") for stage in ended):
            continue
        life = 1
        while (kept := record.with_name(f"{run_dir.life_name(stem, life)}.json")).exists():
            life += 1
        record.replace(kept)


def own_values(plan: LaunchPlan, environment: dict[str, str]) -> dict[str, str]:
    """Return what the plan gets in the places of this node's stand-ins. Raises NodeError, or PlaceError."""
    assert plan.slurm is not None
    stand_ins, group = plan.slurm.ports, plan.group
    first = free_ports(len(stand_ins), ()) if stand_ins else 0
    if first is None:
        raise NodeError(f"no {len(stand_ins)} free ports in a row are left on this node.")
    values = {str(number): str(first + place) for place, number in enumerate(stand_ins)}
    if group is not None:
        here = group.hosts[group.rank]
        values[here.address], values[here.interface] = own_place(environment, group.rank)
    return values


def _write_files(run: RunDir, plan: LaunchPlan, environment: dict[str, str]) -> None:
    """Write what else of the run's files only the node knows."""
    launched = json.loads(read_plain(run.launch)) | {"host": run_dir.host_identity()}
    run_dir.write_json_atomic(run.launch, launched)
    secrets = json.loads(read_plain(run.secrets))
    config = json.loads(read_plain(run.config))
    inherited, left_out = own_environment(environment)
    if undeclared := set(left_out) - set(config["host"]["env"]) - set(secrets["secrets"]):
        run_dir.append_event(run, "note", message=isolation.left_out_note(undeclared))
    requeue = plan.slurm is not None and plan.slurm.requeue  # then they are needed once more
    run_dir.write_secrets(run, secrets | {"inherited": inherited}, in_memory=not requeue)
    nodes = environment.get("SLURM_JOB_NODELIST", os.uname().nodename)
    job_id = environment.get("SLURM_JOB_ID", "")
    run_dir.append_event(
        run, "slurm_job", job_id=job_id, state=run_dir.RUNNING, reason=f"on {nodes}"
    )
    if plan.group is not None:
        address = plan.group.hosts[plan.group.rank].address
        if is_public(address):
            message = f"the nodes meet at {address}, which is not a private address: gloo and NCCL encrypt nothing"
            run_dir.append_event(run, "note", message=message)


def given_gpus(environment: dict[str, str]) -> list[str]:
    """Return the GPUs that Slurm gave on this node, as it names them."""
    told = next((environment[name] for name in GIVEN if environment.get(name)), "")
    return [word.strip() for word in told.split(",") if word.strip()]


def with_gpus(plan: dict[str, Any], given: list[str], needed: int) -> dict[str, Any]:
    """Return the plan's JSON with each GPU by its place among those that Slurm gave. Raises NodeError for too few."""
    if len(given) < needed:
        raise NodeError(
            f"Slurm gave {len(given)} GPUs here ({', '.join(given) or 'none'}), and the config uses {needed}."
            " Ask for them with --gres=gpu:N in the options file, or leave that out: then it is done."
        )

    def fitted(value: Any) -> Any:
        if isinstance(value, list):
            return [fitted(item) for item in value]
        if not isinstance(value, dict):
            return value
        found = {name: fitted(item) for name, item in value.items()}
        if numbers := found.get(GPUS_VARIABLE):
            own = [given[int(number)] for number in numbers.split(",")]
            found[VISIBLE] = ",".join(own)
            if all(word.isdigit() for word in own):  # a slice of a card has a name
                found[GPUS_VARIABLE] = found[VISIBLE]
        return found

    return dict(fitted(plan))


def with_values(plan: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
    """Return the plan's JSON with these values in place of their stand-ins, which are like nothing else in it."""
    text = json.dumps({**plan, "slurm": None})
    for stand_in, value in values.items():
        text = text.replace(stand_in, value)
    return {**json.loads(text), "slurm": plan["slurm"]}


def _await_own_job(run: RunDir, job_id: str) -> None:
    """Return once slurm.json names this job. Raises NodeError for another's: a submission that was cut off."""
    deadline = time.monotonic() + JOB_WAIT_S
    while (job := run_dir.read_slurm_job(run)) is None:
        if time.monotonic() > deadline:
            raise NodeError(f"{run.slurm_job} is not there: job {job_id} was not wanted any more.")
        time.sleep(POLL_S)
    if job.job_id != job_id:
        raise NodeError(f"the run's job is {job.job_id}, and this is {job_id}: it ends.")


def main() -> None:
    try:
        run, plan = prepare(RunDir(Path(sys.argv[1])), dict(os.environ))
    except (NodeError, PlaceError) as error:
        sys.exit(f"error: {name_of(dict(os.environ))}: {error}")
    command = window_command(plan.base_python, run, SUPERVISOR_STAGE, SUPERVISOR_WINDOW)
    os.chdir(plan.program_path)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
