"""Follow a run, and stop it where the user asks for that on the display."""

from rollouts.remote.errors import Gone, HostGoneError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.machine_end import ALL_HERE
from rollouts.remote.rented_host import why_gone
from rollouts.remote.run.connection import WhyGone
from rollouts.remote.run.open_run import OpenRun
from rollouts.remote.run.other_hosts import refuse_if_ended, stop_on
from rollouts.remote.run.registry import RunEntry, entries, find, note_stop_asked
from rollouts.remote.run.run_names import find_known
from rollouts.remote.run.watch import RunResult
from rollouts.remote.texts import stopped_without_host
from rollouts.view.answer import Answer
from rollouts.view.reporter import Reporter


def why_gone_of(entry: RunEntry) -> WhyGone:
    """Return what is asked whenever the run's first host did not answer."""

    def ask(target: str) -> Gone | None:
        refuse_if_ended(entry)
        return why_gone(target)

    return ask


def watch_run(run: OpenRun, reporter: Reporter) -> RunResult:
    """Follow a run to its end. Raises DeployError, or KeyboardInterrupt to detach."""
    while True:
        try:
            return run.watch(reporter, why_gone_of(run.entry))
        except KeyboardInterrupt:
            if not reporter.take_stop():
                raise
            note_stop_asked(run.entry)
            stop_on(run.entry, run.transport, run.python, now=False)


def lost_host(entry: RunEntry, state: str, *, pulled: bool) -> HostGoneError | None:
    """Return the error of a run that ended early because a rented machine of it is gone; None for any other end.

    A machine that is taken away may end its processes in order first: then the run says that it was stopped. While
    something of the run is to be pulled, the loss of another machine than the first is no reason to end that one. A run
    that somebody stopped, and all of which is here, lost nothing.
    """
    if state == "done" or (pulled and entry.stop_asked):
        return None
    others = [other["target"] for other in entry.others] if pulled else []
    for target in (entry.target, *others):
        gone = why_gone(target)
        if gone is not None and gone.why != ALL_HERE:
            return HostGoneError(entry.run_id, target, gone)
    return None


def note_stop(run_id: str, remote: str | None) -> Answer | None:
    """Write down here that a run is to stop. Returns what there is to say where its rented machine is gone already."""
    with as_deploy_errors():
        known = find(run_id) or (None if remote else find_known(run_id))
        if known is None:
            return None
        note_stop_asked(known)
        return stopped_without_host(known, entries()) if known.interrupted else None
