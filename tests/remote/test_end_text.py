"""What verbs print of runs: the end of a followed one, the table of `ls`, what is left of a forgotten one."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from rollouts.remote.looks import what_lies_here
from rollouts.remote.run import mirror_note, run_names
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.watch import RunResult
from rollouts.remote.texts import forgotten_text, result_text
from rollouts.view.fold import View, fold
from rollouts.view.tables import runs_text

ENTRY = RunEntry(
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
    view = fold(
        View(),
        "events.jsonl",
        {**event, "message": "no group had contrast\x1b[2J. Fix: more samples"},
    )
    view = fold(
        view,
        "events.jsonl",
        {**event, "step": 9, "message": "no group had contrast\x1b[2J. Fix: more samples"},
    )
    view = fold(view, "events.jsonl", {**event, "message": "the model does not stop"})
    text = result_text(ENTRY, RunResult("done", 0, view), 0, None, [])
    warnings, end = text.split("\n\n")
    assert warnings.splitlines() == [
        r"warning: no group had contrast\x1b[2J. Fix: more samples",
        "warning: the model does not stop",
    ]
    assert end.startswith("r: done, exit code 0")
    assert "warning" not in result_text(ENTRY, RunResult("done", 0, View()), 0, None, [])


RUN = {
    "run_id": "cpu_sft_rl-20261129-095625-0c52",
    "target": "local",
    "state": "running",
    "stage": "rl",
    "step": 300,
}
RUN |= {"started_at": 1795946187.5, "exit_code": None, "message": ""}


def test_the_table_of_runs_fits_its_terminal() -> None:
    """Goal: at 80 columns a run is one line that does not wrap; at 120 and in a pipe each value is there. Red with one
    shape for all widths: 93 columns, broken in the middle of a time."""
    failed = {**RUN, "run_id": "x-1", "state": "failed", "exit_code": 1, "message": "why"}
    narrow = runs_text([RUN, failed], width=80).splitlines()
    assert max(map(len, narrow)) <= 80 and narrow[0].split() == ["run_id", "state", "at", "started"]
    assert narrow[1].split()[:4] == [RUN["run_id"], "running", "rl", "300"]
    assert narrow[3:] == ["  error: why", "all on local"]
    for width in (None, 120):
        wide = runs_text([RUN, failed], width=width).splitlines()
        assert len(wide) == 4 and wide[1].split()[:4] == [RUN["run_id"], "local", "running", "rl"]
    assert runs_text([failed], width=80).splitlines()[1].split()[:2] == ["x-1", "local"], (
        "a short name fits"
    )


def test_two_hundred_runs_are_two_hundred_lines() -> None:
    """Goal: many runs with long names on several hosts stay readable at 80 columns: one line each, no two names the
    same, and each cut name still means its run. Red with names cut at their end, and with an error under each run."""
    names = [
        f"a_sweep_of_many_values_and_a_long_name-20261129-1002{n % 60:02d}-{n:04x}-seed_{n}"
        for n in range(200)
    ]
    rows = [
        RUN | {"run_id": name, "target": f"user@gpu-{n % 3}.lab.example"}
        for n, name in enumerate(names)
    ]
    rows = [row | {"state": "failed", "message": "why", "exit_code": 1} for row in rows]
    heading, *lines, last = runs_text(rows, width=80).splitlines()
    assert len(lines) == 200 and max(map(len, lines)) <= 80
    assert heading.split() == ["run_id", "state", "at", "started", "target"]
    assert last == "200 runs; 200 with a note: `deploy status RUN` says it"
    for name, line in zip(names, lines, strict=True):
        assert run_names.find_by_prefix(line.split()[0], names) == name


@pytest.mark.parametrize(
    ("state", "goes_on"),
    [("running", True), ("starting", True), ("done", False), ("unknown", False)],
)
def test_a_run_that_is_forgotten_while_it_goes_on(state: str, goes_on: bool) -> None:
    """Goal: dropping the record of a live run says so, and how it is found. Red without: it trained on, unseen."""
    host = dataclasses.replace(ENTRY, target="me@gpu:22")
    for entry, options in ((ENTRY, ""), (host, " --remote me@gpu:22")):
        text = forgotten_text(entry, state)
        assert ("goes on" in text) == goes_on
        assert (f"`deploy attach r{options}` or `deploy stop r{options}`" in text) == goes_on


def test_a_mirror_whose_follower_is_gone(tmp_path: Path) -> None:
    """Goal: `status` says that the run is not followed once its process is gone. Red with the note's own words, which
    leave it to the reader to find out."""
    entry = dataclasses.replace(ENTRY, local_dir=str(tmp_path / "r"))
    assert what_lies_here(entry) == "nothing was pulled"
    mirror_note.write_note(entry, now=1.0, followed_by=os.getpid())
    assert what_lies_here(entry).startswith(f"followed by process {os.getpid()}")
    ended = subprocess.Popen(["true"])
    ended.wait()
    mirror_note.write_note(entry, now=1.0, followed_by=ended.pid)
    assert what_lies_here(entry).startswith("not followed any more: `deploy attach r`")
