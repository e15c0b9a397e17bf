"""What the end of a followed run shows."""

from rollouts.remote.registry import Entry
from rollouts.remote.texts import result_text
from rollouts.remote.view import View, fold
from rollouts.remote.watch import Result

ENTRY = Entry(
    run_id="r",
    experiment_name="example",
    target="local",
    home="/h",
    run_path="/h/runs/r",
    local_dir="/here/runs/example/r",
    repository="/here",
    created_at=1.0,
)


def test_warnings_are_shown_again_at_the_end() -> None:
    """Goal: each once, above the end, with control characters escaped; a run without any has no such line. Red with
    the events shown as they come alone: they have scrolled away by then."""
    event = {"time": 1.0, "kind": "warning", "stage": "rl", "step": 5, "cause": "no_contrast"}
    view = fold(View(), "events.jsonl", {**event, "message": "no group had contrast\x1b[2J. Fix: more samples"})
    view = fold(
        view, "events.jsonl", {**event, "step": 9, "message": "no group had contrast\x1b[2J. Fix: more samples"}
    )
    view = fold(view, "events.jsonl", {**event, "message": "the model does not stop"})
    text = result_text(ENTRY, Result("done", 0, view), 0, None, [])
    warnings, end = text.split("\n\n")
    assert warnings.splitlines() == [
        r"warning: no group had contrast\x1b[2J. Fix: more samples",
        "warning: the model does not stop",
    ]
    assert end.startswith("r: done, exit code 0")
    assert "warning" not in result_text(ENTRY, Result("done", 0, View()), 0, None, [])
