"""`deploy sweep NAME`: the runs of a sweep once more, from any machine state: their table, and with -f their end."""

from collections.abc import Sequence

from rollouts.remote.commands import attach
from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.reporting import DETACHED
from rollouts.remote.run import registry
from rollouts.remote.run.follow import apply, tail
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.open_run import open_run
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.remote.sweep_runs import NOT_STARTED, Outcome, SweepRecord, find_sweep, outcome_table
from rollouts.run_dir import FINAL_STATES
from rollouts.view.answer import Answer
from rollouts.view.screen import Screen


def show_sweep(name: str, screen: Screen, *, until_end: bool) -> int:
    """Print the table of a sweep as it is now, or follow its runs to their end first (`deploy sweep NAME`)."""
    with as_deploy_errors():
        record = find_sweep(name)
    outcomes = [Outcome(member) for member in record.members]
    if until_end:
        return follow_sweep(record, outcomes, screen)
    for outcome in outcomes:
        outcome.look_back()
        if outcome.state not in (NOT_STARTED, *FINAL_STATES):
            _refresh(outcome, screen)
    return screen.show(Answer(_document(record, outcomes, None), outcome_table(outcomes)))


def _refresh(outcome: Outcome, screen: Screen) -> None:
    """Bring the run's rows here as they are now. A host that does not answer is told; the last look counts then."""
    try:
        with open_run(outcome.run.run_id, None) as run:
            mirror = Mirror(run.entry.mirror)
            for message in (
                tail(run.connection, mirror, until_end=False) if run.trace == "on its host" else ()
            ):
                apply(mirror, message)
    except DeployError as error:
        screen.remark(f"note: {outcome.run.run_id} as last seen: {error}")
    outcome.look_back()


def follow_sweep(
    record: SweepRecord, outcomes: Sequence[Outcome], screen: Screen, wanted: ToBring = EVERYTHING
) -> int:
    """Follow the runs one after another, in their order. Returns 0 if all ended with 0, else the first other code.

    Ctrl-C ends that, and no run.
    """
    for at, outcome in enumerate(outcomes, 1):
        outcome.look_back()
        if outcome.state == NOT_STARTED or registry.find(outcome.run.run_id) is None:
            continue
        if not screen.as_json:
            screen.show(Answer(None, f"\nrun {at} of {len(outcomes)}: {outcome.run.differs}"))
        try:
            outcome.exit_code = attach(
                outcome.run.run_id, screen, remote=None, accept_new_host_key=False, wanted=wanted
            )
        except SystemExit:
            return _detached(record, outcomes, screen)
        except DeployError as error:
            if error.exit_code == DETACHED:
                return _detached(record, outcomes, screen)
            screen.error(error.to_json(), error.text(launching=False))
            outcome.exit_code = error.exit_code
        outcome.look_back()
    return screen.show(end_of_sweep(record, outcomes))


def _detached(record: SweepRecord, outcomes: Sequence[Outcome], screen: Screen) -> int:
    for outcome in outcomes:
        outcome.look_back()
    text = f"\n{outcome_table(outcomes)}\ntheir states are as last seen; go on: deploy sweep {record.name} -f"
    return screen.show(Answer(_document(record, outcomes, DETACHED), text, exit_code=DETACHED))


def end_of_sweep(record: SweepRecord, outcomes: Sequence[Outcome]) -> Answer:
    """Return the table of a sweep whose runs were followed, with the first exit code that is not 0."""
    code = next((outcome.exit_code or 0 for outcome in outcomes if outcome.exit_code), 0)
    return Answer(_document(record, outcomes, code), f"\n{outcome_table(outcomes)}", exit_code=code)


def _document(
    record: SweepRecord, outcomes: Sequence[Outcome], code: int | None
) -> dict[str, object]:
    runs = [outcome.to_json() for outcome in outcomes]
    return {"type": "sweep", "sweep": record.name, "runs": runs, "exit_code": code}
