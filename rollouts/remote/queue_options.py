"""What --wait, --queue and --at-once ask for together, and --slurm instead of them."""

from pathlib import Path

from rollouts.remote.errors import DeployError
from rollouts.remote.plan import QueueWish, SlurmOptions
from rollouts.remote.slurm_start import read_options_file


def queue_wish(*, wait: bool, queue: bool, at_once: int | None, busy_ok: bool) -> QueueWish | None:
    """Return how the run is to wait; None: it starts at once. Raises DeployError for options that contradict."""
    if wait and queue:
        raise DeployError(
            "--wait and --queue: one of the two.",
            needed="--wait takes the GPUs that the config names, --queue as many of any that are like them",
            fix="leave out one",
        )
    if not wait and not queue:
        if at_once is not None:
            raise DeployError(
                f"--at-once {at_once} has no effect without a queue.",
                fix="add --queue (or --wait), or leave it out",
            )
        return None
    if busy_ok:
        raise DeployError(
            "--busy-ok starts beside what uses a GPU, and a queued run waits for its end.",
            fix="leave out one",
        )
    return QueueWish(any_gpus=queue, at_once=at_once or 1)


def slurm_wish(
    file: Path | None,
    queue: QueueWish | None,
    *,
    busy_ok: bool,
    hosts: int = 1,
    sweeps: bool = False,
) -> SlurmOptions | None:
    """Return what --slurm asks for. Raises DeployError for what it does not go with."""
    if file is None:
        return None
    if queue is not None or busy_ok:
        raise DeployError(
            "--slurm gives the run to Slurm, which has a queue and GPUs of its own.",
            fix="leave out --wait, --queue and --busy-ok",
        )
    if sweeps:
        raise DeployError(
            "--slurm starts one run, and --set asks for several.",
            fix="name one value a field, and submit the runs one after another with --detach",
        )
    if hosts > 1:
        raise DeployError(
            "--slurm has one login host, and the command names several.",
            needed="--remote user@login",
            fix="name the login host alone",
        )
    return read_options_file(file)
