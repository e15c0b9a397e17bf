"""`deploy ls`: which runs, in which order, how quickly; and what it says of options that mean nothing."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deploy_ls import imports_torch, make_runs
from rollouts.remote import list_runs
from rollouts.remote.errors import DeployError
from rollouts.remote.list_runs import read_moment, read_wanted
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen, note_died, note_seen
from rollouts.remote.run.run_names import known_run, name_problems
from rollouts.remote.run.tags import tag_run, tags
from rollouts.run_dir import RunDir, write_json_atomic
from tests.remote.hosts import Host, Laptop
from tests.remote.test_remove import fill

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with 30 runs: one each 2.4 hours, of 7 experiments, every fifth failed, the last an hour old."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    make_runs(tmp_path / "runs", 30)
    return tmp_path


def listed(**options: Any) -> list[dict[str, Any]]:
    settings = {
        "states": (),
        "experiment": None,
        "since": None,
        "sort": "started",
        "now": time.time(),
        **options,
    }
    return list(list_runs.list_runs(remote=None, wanted=read_wanted(**settings)).document)


def test_filters_and_orders(runs_here: Path) -> None:
    """Goal: each filter leaves exactly its runs, together those of all; each order is one. Red with `fits` answering
    True, and with rows sorted by their words for numbers."""
    everything = listed()
    assert len(everything) == 30 and {row["state"] for row in everything} == {
        "done",
        "stopped",
        "running",
        "failed",
    }
    assert [row["state"] for row in listed(states=("failed,stopped", "running"))].count(
        "failed"
    ) == 6
    assert len(listed(states=("failed,stopped", "running"))) == 18
    assert {row["experiment_name"] for row in listed(experiment="experiment_[12]")} == {
        "experiment_1",
        "experiment_2",
    }
    assert len(listed(since="1d")) == 10 and listed(since="1d") == everything[-10:]
    assert len(listed(since="12h", states=("failed",))) == 1
    for key, field in (
        ("experiment", "experiment_name"),
        ("state", "state"),
        ("run", "run_id"),
        ("target", "target"),
    ):
        found = [row[field] for row in listed(sort=key)]
        assert found == sorted(found) and len(found) == 30
    assert [row["started_at"] for row in everything] == sorted(
        row["started_at"] for row in everything
    )


def test_a_failed_run_is_listed_with_its_last_error(runs_here: Path) -> None:
    """Goal: the error is found among many events. Red with the status's message alone."""
    assert {row["message"] for row in listed(states=("failed",))} == {"the trainer ended"}


def test_a_run_is_as_its_host_said_last(runs_here: Path) -> None:
    """Goal: a run that its host was seen to have lost is listed as died, until its mirror is newer; a step is shown of
    the stage that the run is in. Red with the mirror's status alone, and with the last row of any stage."""
    entry = next(entry for entry in registry.entries() if last_seen(entry)["state"] == "running")
    (row,) = (row for row in listed() if row["run_id"] == entry.run_id)
    assert row["step"] is not None
    note_died(entry)
    died = {row["run_id"]: row for row in listed(states=("died",))}
    assert died[entry.run_id]["step"] == row["step"] and died[entry.run_id]["stage"] == "rl"
    status = json.loads(entry.mirror.status.read_text())
    later = status | {"updated_at": status["updated_at"] + 5, "stage": "sft"}
    write_json_atomic(entry.mirror.status, later)
    assert last_seen(entry)["state"] == "running" and last_seen(entry)["step"] is None
    note_seen(entry, died[entry.run_id] | {"updated_at": later["updated_at"], "step": 77})
    assert last_seen(entry)["step"] == 77
    entry.seen.write_text("[]")
    assert last_seen(entry)["state"] == "running"
    registry.forget(entry)
    assert not entry.seen.exists()


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
    assert (
        read_moment("2d", now=1e6) == 1e6 - 172_800 and read_moment("1.5h", now=1e6) == 1e6 - 5400
    )
    assert time.localtime(read_moment("2026-11-01", now=0.0))[:5] == (2026, 11, 1, 0, 0)


def test_ls_of_many_runs_is_one_process_without_slow_modules(runs_here: Path) -> None:
    """Goal: the command reads a registry of runs with nothing slow imported, neither the config's schema nor a plan:
    the benchmark's times rest on that. Red with `rollouts.config` imported by the registry."""
    assert not imports_torch(["ls"])
    code = "import sys, deploy\nsys.argv = ['deploy', 'ls', '--json']\ntry: deploy.main()\nfinally: print(sorted("
    code += "name for name in sys.modules if name.startswith(('rollouts.config', 'rollouts.remote.plan', 'paramiko'))))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_tag_means_its_run(runs_here: Path) -> None:
    """Goal: a tag names one run wherever a run is asked for, is shown and filtered by, and goes with its run; `last` is
    still the newest. Red with tags written into the entries, whose times decide what `last` is, and with tags kept when
    their run was forgotten."""
    first, second, *_, newest = [row["run_id"] for row in listed()]
    assert list_runs.tag(first, "best", remove=False).document == {
        "run_id": first,
        "tags": ["best"],
    }
    list_runs.tag("best", "paper-1", remove=False)
    assert (
        known_run("best").run_id == known_run("paper-1").run_id == first
        and known_run("last").run_id == newest
    )
    assert [row["run_id"] for row in listed(tag="paper-*")] == [first]
    assert "best paper-1" in (
        list_runs.list_runs(remote=None, wanted=list_runs.Wanted()).text or ""
    )
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


def test_damaged_tags_are_not_written_over(runs_here: Path) -> None:
    """Goal: a damaged file of tags is named, by `ls` too, and no tag is given or taken until it is mended. Red with
    it taken for an empty one: the next tag was the only one left."""
    run_id = registry.entries()[0].run_id
    list_runs.tag(run_id, "paper", remove=False)
    file = runs_here / "home/registry/.tags.json"
    for damaged in (file.read_text()[:-5], "[]", "\xff"):
        file.write_text(damaged, encoding="latin-1")
        for remove in (False, True):
            with pytest.raises(DeployError, match="the tags of this machine cannot be read"):
                list_runs.tag(run_id, "paper", remove=remove)
        (note,) = list_runs.list_runs(remote=None, wanted=list_runs.Wanted()).remarks
        assert str(file) in note and file.read_text(encoding="latin-1") == damaged


def test_an_entry_that_goes_away_or_leads_nowhere(runs_here: Path) -> None:
    """Goal: a name in the registry without a file behind it, as of a run that is forgotten meanwhile, hides no other
    run. Red with its time asked for: `No such file or directory`, and no list."""
    (runs_here / "home/registry/gone.json").symlink_to("nowhere")
    (runs_here / "home/registry/folder.json").mkdir()
    assert len(listed()) == 30
    assert known_run("last").run_id == listed()[-1]["run_id"]


def test_tags_on_a_host(
    laptop: Laptop, make_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: with --remote a tag means its run too, is shown in the host's list, and chooses from it. Red with the tags
    of this machine left out there: no such run, and the whole list."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(laptop.rollouts_home))
    host = make_host()
    for run_id in ("first", "second"):
        fill(RunDir(host.run_path(run_id)))
    tag_run("first", "paper", run_ids=[])
    assert laptop.json("status", "paper", "--remote", host.target)["run_id"] == "first"
    assert [row["tags"] for row in laptop.json("ls", "--remote", host.target)] == [["paper"], []]
    for tag, found in (("pap*", ["first"]), ("none", [])):
        rows = laptop.json("ls", "--remote", host.target, "--tag", tag)
        assert [row["run_id"] for row in rows] == found


def test_a_new_run_is_not_called_what_means_another(runs_here: Path) -> None:
    """Goal: a --run-id that is a tag, or `last`, is refused with the run that it means, before anything is touched; a
    tag that was taken away is free. Red without the look at tags."""
    run_id = registry.entries()[0].run_id
    list_runs.tag(run_id, "paper", remove=False)
    (taken,) = name_problems("paper", runs_here / "none")
    assert taken.message == f"the run id 'paper' is a tag of {run_id}."
    assert f"deploy tag {run_id} paper --remove" in taken.fix
    assert "the newest run" in name_problems("last", runs_here / "none")[0].message
    assert "in use here" in name_problems(run_id, runs_here / "none")[0].message
    list_runs.tag(run_id, "paper", remove=True)
    assert name_problems("paper", runs_here / "none") == []
