"""How far a run is."""

from rollouts.run_dir.files import last_jsonl_row
from rollouts.run_dir.layout import RunDir


def last_step(run: RunDir, stage: str | None) -> int | None:
    """Return the last step of this stage; None before its first, when the last row may be of the stage before it."""
    try:
        row = last_jsonl_row(run.metrics) or {}
    except ValueError:  # a damaged line: no reason to hide the run
        return None
    step = row.get("step")
    return step if row.get("stage") == stage and type(step) is int else None
