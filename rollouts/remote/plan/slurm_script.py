"""The batch script in which Slurm runs a run. Pure: options + config + paths → text for sbatch."""

import re
import shlex
from pathlib import Path

from rollouts.config import Config
from rollouts.remote.plan.slurm_options import GPU_OPTIONS, SlurmOptions, gpus_needed
from rollouts.run_dir import LaunchPlan, RunDir, not_seen

WHY = "since the time limit of its job is near"
SIGNAL_S = 300  # before the time limit: for the step under way and its checkpoint
_BODY = """\
# Near the time limit the run is asked for a checkpoint, and for its end after it
near=
ask() {{ echo '{why}' > {asked}; near=yes; }}
trap ask USR1
trap : TERM
{check}{srun} --kill-on-bad-exit=0{no_kill} \\
  {command} &
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
{again}exit $code
"""
# Each node sees the run's directory; the one that runs this script does
_SEES = """\
n=0
until ls {runs} >/dev/null 2>&1 && [ -e {plan} ]; do
  n=$((n+1)); [ $n -lt {tries} ] && sleep 1 && continue
  echo "error: ${{SLURMD_NODENAME:-$(uname -n)}}" {unseen} >&2
  exit 66
done
"""
SEES_TRIES = 5  # a second apart: a shared disk may show a new directory late
# The run has saved a checkpoint near the time limit and ended: it goes on in the job's next start
_AGAIN = '[ "$near$code" != yes143 ] || scontrol requeue "$SLURM_JOB_ID"\n'


def slurm_script(options: SlurmOptions, config: Config, launch: LaunchPlan) -> str:
    """Return the script: our options, the user's, the user's lines, then a supervisor on each node."""
    run, nodes = RunDir(Path(launch.run_path)), config.job_hosts
    no_kill = ["--no-kill"] if config.fewer_hosts() else []  # a node that fails is left out
    ours = [
        f"--job-name={launch.run_id}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *_gpus(options, config),
        f"--output={run.log('slurm')}",
        "--open-mode=append",
        f"--chdir={launch.program_path}",
        *([] if options.has("requeue") else ["--no-requeue"]),
        *no_kill,
        *([] if options.has("signal") else [f"--signal=B:USR1@{signal_s(options.value('time'))}"]),
    ]
    theirs = [
        f"--{name}" if value is None else f"--{name}={value}"
        for name, value in options.options
        if name not in ("nodes", "no-requeue")
    ]
    node = [launch.base_python, "-E", "-m", "rollouts.worker.slurm_node", launch.run_path]
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpu-bind=none"
    body = _BODY.format(
        why=WHY,
        asked=shlex.quote(str(run.stop_asked)),
        check=f"{srun} sh -c {shlex.quote(_sees(run))} || exit $?\n" if nodes > 1 else "",
        srun=srun,
        no_kill=" --no-kill" if no_kill else "",
        command=shlex.join(node),
        again=_AGAIN if options.has("requeue") else "",
    )
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(option)}" for option in (*ours, *theirs)),
        *options.shell,
    ]
    return "\n".join([*lines, body])


def _sees(run: RunDir) -> str:
    return _SEES.format(
        runs=shlex.quote(str(run.path.parent)),
        plan=shlex.quote(str(run.plan)),
        tries=SEES_TRIES,
        unseen=shlex.quote(not_seen(run)),
    )


def _gpus(options: SlurmOptions, config: Config) -> list[str]:
    """Ask for as many GPUs as the config uses, unless the user did, as by a type."""
    count = gpus_needed(config)
    asked = any(
        name in GPU_OPTIONS and (name != "gres" or "gpu" in (value or ""))
        for name, value in options.options
    )
    return [f"--gres=gpu:{count}"] if count and not asked else []


def signal_s(time: str | None) -> int:
    """Return how long before the time limit the run is asked for a checkpoint: less in a short job."""
    limit_s = limit_of(time)
    return SIGNAL_S if limit_s is None else max(1, min(SIGNAL_S, limit_s // 4))


def limit_of(time: str | None) -> int | None:
    """Return a time limit in seconds; None for none, or one that is not read.

    Source: sbatch(1), --time: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s.
    """
    if time is None or not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
