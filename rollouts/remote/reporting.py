"""What is shown of a run while it is followed, and what becomes of the run when its user, or its reader, leaves."""

import contextlib
import time
from collections.abc import Iterator

from rollouts.remote.errors import DeployError
from rollouts.remote.machine_end import cost_so_far, is_rented
from rollouts.remote.run.mirror_note import write_note
from rollouts.remote.run.open_run import OpenRun
from rollouts.remote.texts import how_to_go_on
from rollouts.view.answer import Answer
from rollouts.view.display import make_reporter
from rollouts.view.reporter import Reporter
from rollouts.view.screen import Screen
from rollouts.view.unread import all_the_same, is_read, output_may_close

DETACHED = 130  # as a shell says of Ctrl-C


@contextlib.contextmanager
def reporting(run: OpenRun, screen: Screen) -> Iterator[Reporter]:
    """Yield a reporter, closed at the end. Ctrl-C while a run is followed says how to go on, and exits.

    So does a reader that leaves, as in `deploy attach RUN | head`, once the run is launched. Not where a machine was
    rented for it: that bills until somebody ends it, so the run is followed to its end.
    """
    entry = run.entry

    def left() -> None:
        if run.progress.reached == "launched":
            raise KeyboardInterrupt

    rented = is_rented(entry.run_id)
    with output_may_close(all_the_same(entry.run_id) if rented else left):
        reporter = make_reporter(as_json=screen.as_json, cost=cost_so_far(entry.run_id))
        try:
            yield reporter
        except KeyboardInterrupt:
            reporter.close()
            if run.progress.reached != "launched":
                raise
            with contextlib.suppress(OSError, DeployError):
                write_note(entry, now=time.time(), followed_by=None)
            detached = f"detached. {how_to_go_on(entry)}"
            document = {
                "type": "result",
                "run_id": entry.run_id,
                "state": "detached",
                "exit_code": None,
            }
            unread = "" if is_read() else "nobody reads the output any more: "
            screen.show(Answer(document, f"\n{unread}{detached}"))
            raise SystemExit(DETACHED) from None
        finally:
            reporter.close()


def leave_if_unread(run_id: str) -> None:
    """Raise KeyboardInterrupt, which detaches, where the reader left before the run was launched."""
    if not is_read() and not is_rented(run_id):
        raise KeyboardInterrupt
