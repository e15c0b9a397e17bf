"""What --wait, --queue and --at-once ask for together."""

from rollouts.remote.errors import DeployError
from rollouts.remote.plan import QueueWish


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
                f"--at-once {at_once} has no effect without a queue.", fix="add --queue (or --wait), or leave it out"
            )
        return None
    if busy_ok:
        raise DeployError(
            "--busy-ok starts beside what uses a GPU, and a queued run waits for its end.", fix="leave out one"
        )
    return QueueWish(any_gpus=queue, at_once=at_once or 1)
