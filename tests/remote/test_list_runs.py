"""`deploy ls`: which runs, in which order, how quickly; and what it says of options that mean nothing."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deploy_ls import imports_torch, make_runs
from rollouts.remote import list_runs
from rollouts.remote.errors import DeployError
from rollouts.remote.list_runs import read_moment, read_wanted
from rollouts.remote.run import registry
from rollouts.remote.run.run_names import known_run
from rollouts.remote.run.tags import tags

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with 30 runs: one each 2.4 hours, of 7 experiments, every fifth failed, the last an hour old."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    make_runs(tmp_path / "runs", 30)
    return tmp_path


def listed(**options: Any) -> list[dict[str, Any]]:
    settings = {"states": (), "experiment": None, "since": None, "sort": "started", "now": time.time(), **options}
    return list(list_runs.list_runs(remote=None, wanted=read_wanted(**settings)).document)


def test_filters_and_orders(runs_here: Path) -> None:
    """Goal: each filter leaves exactly its runs, together those of all; each order is one. Red with `fits` answering
    True, and with rows sorted by their words for numbers."""
    everything = listed()
    assert len(everything) == 30 and {row["state"] for row in everything} == {"done", "stopped", "running", "failed"}
    assert [row["state"] for row in listed(states=("failed,stopped", "running"))].count("failed") == 6
    assert len(listed(states=("failed,stopped", "running"))) == 18
    assert {row["experiment_name"] for row in listed(experiment="experiment_[12]")} == {"experiment_1", "experiment_2"}
    assert len(listed(since="1d")) == 10 and listed(since="1d") == everything[-10:]
    assert len(listed(since="12h", states=("failed",))) == 1
    for key, field in (("experiment", "experiment_name"), ("state", "state"), ("run", "run_id"), ("target", "target")):
        found = [row[field] for row in listed(sort=key)]
        assert found == sorted(found) and len(found) == 30
    assert [row["started_at"] for row in everything] == sorted(row["started_at"] for row in everything)


def test_a_failed_run_is_listed_with_its_last_error(runs_here: Path) -> None:
    """Goal: the error is found among many events. Red with the status's message alone."""
    assert {row["message"] for row in listed(states=("failed",))} == {"the trainer ended"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"states": ("finished",)}, "--state 'finished': there is no such state."),
        ({"states": ("done,runing",)}, "--state 'runing'"),
        ({"sort": "loss"}, "--sort 'loss'"),
        ({"since": "yesterday"}, "--since 'yesterday' is not a time."),
        ({"since": "-2d"}, "is not a time"),
        ({"since": "2026-13-01"}, "is not a time"),
        ({"since": "9999999999d"}, "is not a time"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    """Goal: a wrong word is named, with what is allowed, in place of an empty list. Red with the checks left out."""
    with pytest.raises(DeployError) as caught:
        listed(**options)
    assert said in str(caught.value) and caught.value.problems[0].needed


def test_moments() -> None:
    """Goal: `2d` is two days ago, and a date is that day here. Red with hours counted as minutes."""
    assert read_moment("2d", now=1e6) == 1e6 - 172_800 and read_moment("1.5h", now=1e6) == 1e6 - 5400
    assert time.localtime(read_moment("2026-11-01", now=0.0))[:5] == (2026, 11, 1, 0, 0)


def test_ls_of_many_runs_is_one_process_without_slow_modules(runs_here: Path) -> None:
    """Goal: the command reads a registry of runs with nothing slow imported, neither the config's schema nor a plan:
    the benchmark's times rest on that. Red with `rollouts.config` imported by the registry."""
    assert not imports_torch(["ls"])
    code = "import sys, deploy\nsys.argv = ['deploy', 'ls', '--json']\ntry: deploy.main()\nfinally: print(sorted("
    code += "name for name in sys.modules if name.startswith(('rollouts.config', 'rollouts.remote.plan', 'paramiko'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_tag_means_its_run(runs_here: Path) -> None:
    """Goal: a tag names one run wherever a run is asked for, is shown and filtered by, and goes with its run; `last` is
    still the newest. Red with tags written into the entries, whose times decide what `last` is, and with tags kept when
    their run was forgotten."""
    first, second, *_, newest = [row["run_id"] for row in listed()]
    assert list_runs.tag(first, "best", remove=False).document == {"run_id": first, "tags": ["best"]}
    list_runs.tag("best", "paper-1", remove=False)
    assert known_run("best").run_id == known_run("paper-1").run_id == first and known_run("last").run_id == newest
    assert [row["run_id"] for row in listed(tag="paper-*")] == [first]
    assert "best paper-1" in (list_runs.list_runs(remote=None, wanted=list_runs.Wanted()).text or "")
    for name, tag, said in (
        (second, "best", f"'best' is a tag of {first}"),
        (second, newest, "is the name of a run"),
        (second, "last", "is not a tag"),
        (second, "../x", "is not a tag"),
        (second, "", "is not a tag"),
        ("nothing", "x", "there is no run"),
    ):
        with pytest.raises(DeployError) as caught:
            list_runs.tag(name, tag, remove=False)
        assert said in str(caught.value)
    with pytest.raises(DeployError, match="has no tag"):
        list_runs.tag(second, "best", remove=True)
    list_runs.tag(first, "best", remove=True)
    registry.forget(known_run("paper-1"))
    assert tags() == {}
    with pytest.raises(DeployError, match="there is no run"):
        known_run("paper-1")
