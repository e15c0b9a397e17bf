"""`deploy stop`, as a stage hears of it: a file, looked for after each step."""

import contextlib
from collections.abc import Iterator

from rollouts.run_dir import RunDir
from rollouts.training import distributed


class StopRequest:
    """Tell a loop, on rank 0, whether the run was asked to stop."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._heard = False

    def __call__(self) -> bool:
        self._heard = self._run.stop_asked.exists()
        return self._heard

    def ended_the_steps(self) -> bool:
        """Return, on every rank, whether the loop ended for it, before its last step."""
        return distributed.broadcast_object(self._heard)


@contextlib.contextmanager
def heeding_stop(run: RunDir) -> Iterator[StopRequest]:
    """Let `deploy stop` know, meanwhile, that a request is heeded: it waits for the checkpoint."""
    if distributed.rank() == 0:
        run.heeds_stop.touch(mode=0o600)
    try:
        yield StopRequest(run)
    finally:
        if distributed.rank() == 0:
            run.heeds_stop.unlink(missing_ok=True)
