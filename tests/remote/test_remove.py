"""`deploy rm`: what goes, what is refused, that nothing is lost unasked. Runs are files; locks and hosts are real."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import write_manifest
from rollouts.remote import remove
from rollouts.remote.errors import DeployError
from rollouts.remote.run import registry
from rollouts.remote.run.mirror_files import own_files
from rollouts.remote.run.mirror_note import write_note
from rollouts.run_dir import (
    RunDir,
    Status,
    append_jsonl,
    hold_lock,
    host_identity,
    write_json_atomic,
)
from tests.ports import free_port
from tests.remote.hosts import Host, Laptop
from tests.remote.test_gone_runs import register


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def fill(run: RunDir, *, steps: int = 3, state: Any = "done", checkpoints: int = 1) -> RunDir:
    """Write what a run leaves: status, metrics, a tree, checkpoints."""
    run.path.mkdir(parents=True, exist_ok=True)
    now = time.time()
    status = Status(
        run_id=run.run_id,
        experiment_name="example",
        state=state,
        stage="rl",
        message="m",
        started_at=now,
        updated_at=now,
        exit_code=0 if state == "done" else None,
    )
    write_json_atomic(run.status, status)
    write_json_atomic(run.launch, {"launch_id": None, "host": host_identity()})
    append_jsonl(run.metrics, *({"stage": "rl", "step": n} for n in range(steps)))
    run.code_tree.mkdir(parents=True, exist_ok=True)
    (run.code_tree / "reward.py").write_text("x" * 5000)
    for number in range(checkpoints):
        directory = run.checkpoints / "rl" / f"step_{number:06d}"
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(os.urandom(20_000))
        write_manifest(directory)
    return run


def make_run(home: Path, run_id: str, **options: Any) -> tuple[registry.RunEntry, RunDir]:
    """A run of this machine that is over, registered; its mirror holds the record alone."""
    entry = register(home, home.parent / "results" / "example", run_id)
    run = fill(RunDir(Path(entry.run_path)), **options)
    write_json_atomic(run.launch, {"launch_id": entry.launch_id, "host": host_identity()})
    registry.mark_launched(entry)
    return entry, run


def rm(
    *names: str, keep_results: bool = False, yes: bool = False, confirm: Any = None
) -> list[dict[str, Any]]:
    found = remove.remove_runs(
        names, remote=None, keep_results=keep_results, yes=yes, confirm=confirm
    )
    return list(found.document)


def test_a_run_goes_with_all_of_it_once_that_is_agreed(home: Path) -> None:
    """Goal: results are never gone unasked, the message says where each lies; then directory, results and record go,
    and what they gave back is told. Red with `loss` empty, and with the record dropped before the host's answer."""
    entry, run = make_run(home, "mine")
    append_jsonl(entry.mirror.metrics, {"stage": "rl", "step": 0})
    append_jsonl(entry.mirror.eval, {"stage": "rl", "step": 0})
    with pytest.raises(DeployError) as caught:
        rm("mine")
    found = caught.value.problems[0].found
    assert "only on local: metrics.jsonl, checkpoints/rl/step_000000" in found
    assert (
        f"only in {entry.local_dir}: eval.jsonl" in found
        and "--yes" in caught.value.problems[0].fix
    )
    assert run.path.exists() and entry.mirror.eval.exists() and registry.find("mine") == entry
    with pytest.raises(DeployError, match="nothing was removed"):
        rm("mine", confirm=lambda text: False)
    (row,) = rm("mine", confirm=lambda text: "eval.jsonl" in text)
    assert row["removed_here"] and 25_000 <= row["bytes"] < 200_000
    assert (
        not run.path.exists() and not entry.mirror.path.exists() and registry.find("mine") is None
    )
    assert not entry.record.path.exists() and list((home / "removed").iterdir()) == []


def test_results_that_lie_here_may_stay(home: Path) -> None:
    """Goal: --keep-results needs no --yes once everything was pulled, and leaves the mirror as it is. Red with the
    mirror's results counted as lost."""
    entry, run = make_run(home, "mine")
    with pytest.raises(DeployError, match="would be gone for good"):
        rm("mine", keep_results=True)
    entry.mirror.checkpoints.mkdir()
    (run.checkpoints / "rl").rename(entry.mirror.checkpoints / "rl")
    # the same files, and a link that leads out
    (run.checkpoints / "rl").symlink_to(entry.mirror.checkpoints / "rl")
    entry.mirror.metrics.write_bytes(run.metrics.read_bytes())
    (row,) = rm("mine", keep_results=True)
    assert not row["removed_here"] and not run.path.exists() and registry.find("mine") is None
    assert (entry.mirror.checkpoints / "rl/step_000000/model.safetensors").stat().st_size == 20_000
    assert (entry.mirror.path / "config.json").exists()


def test_a_run_that_left_no_results_needs_no_yes(home: Path) -> None:
    """Goal: a run that failed before it learned anything goes at once; so do several. Red with `config.json` counted
    among the results."""
    for name in ("one", "two"):
        make_run(home, name, steps=0, checkpoints=0, state="failed")[1].metrics.unlink(
            missing_ok=True
        )
    assert [row["run_id"] for row in rm("one", "two", "one")] == ["one", "two"]
    assert registry.entries() == [] and list((home / "runs").iterdir()) == []


def test_files_of_the_user_s_own(home: Path) -> None:
    """Goal: what a person put among a run's results is named and not gone unasked, also of a run without results; what
    a launch or a pull put there is no such file. Red with `own` empty."""
    entry, run = make_run(home, "mine", steps=0, checkpoints=0, state="failed")
    run.metrics.unlink(missing_ok=True)
    ours = (
        *(
            "events.jsonl",
            "status.json",
            "logs/trainer.log",
            "exit/run-supervisor.json",
            ".gitignore",
        ),
        *("code/dirty.diff", "plan-1.json", "hosts/1/logs/supervisor.log", "checkpoints/rl/latest"),
        *("checkpoints/rl/.step_000001.part/model.safetensors", "wandb/offline-run-1/files/a.json"),
    )
    for name in ours:
        (entry.mirror.path / name).parent.mkdir(parents=True, exist_ok=True)
        (entry.mirror.path / name).write_text("{}")
    assert own_files(entry.mirror.path) == ()
    (entry.mirror.path / "logs/notes.md").write_text("my notes")
    with pytest.raises(DeployError, match="gone for good") as caught:
        rm("mine")
    assert (
        caught.value.problems[0].found == f"mine: of your own in {entry.local_dir}: logs/notes.md"
    )
    assert run.path.exists() and (entry.mirror.path / "logs/notes.md").exists()
    assert not rm("mine", keep_results=True)[0]["removed_here"]
    assert (entry.mirror.path / "logs/notes.md").read_text() == "my notes"


@pytest.mark.parametrize(
    "how", ["live", "launched", "followed", "used", "links out", "mirror is a link", "unknown"]
)
def test_what_is_refused(how: str, home: Path, tmp_path: Path) -> None:
    """Goal: a run that is live, is being launched or followed, whose files a live run uses, or whose directory is not
    what deploy made, stays with all of it, and so do the others of the command. Red with each check left out."""
    entry, run = make_run(home, "mine", state="running" if how == "live" else "done")
    other, _ = make_run(home, "other")
    held: list[Any] = []
    names, said = ["other", "mine"], ""
    if how == "live":
        held.append(hold_lock(run))
        said = "is running on local, and stays"
    elif how == "launched":
        run.status.unlink()
        run.launch.unlink()
        (Path(entry.record.path) / registry.LAUNCHED).unlink()
        status = {
            "run_id": "mine",
            "experiment_name": "example",
            "state": "starting",
            "stage": None,
            "message": "",
        }
        times = {"started_at": time.time(), "updated_at": time.time(), "exit_code": None}
        write_json_atomic(run.status, status | times)
        said = "mine is starting on local, and stays"
    elif how == "followed":
        write_note(entry, now=1.0, followed_by=os.getppid())
        said = f"is followed by process {os.getppid()}"
    elif how == "used":
        user = fill(RunDir(home / "runs/user"), state="running")
        held.append(hold_lock(user))
        write_json_atomic(
            user.config, {"model": {"name_or_path": f"{run.path}/checkpoints/rl/step_000000"}}
        )
        names, said = ["mine"], "the live run user uses it"
    elif how == "links out":
        run.path.rename(tmp_path / "elsewhere")
        run.path.symlink_to(tmp_path / "elsewhere")
        names, said = ["mine"], "is a link, or another user's"
    elif how == "mirror is a link":
        entry.mirror.path.rename(tmp_path / "elsewhere")
        entry.mirror.path.symlink_to(tmp_path / "elsewhere")
        said = "it is a link"
    else:
        names, said = ["other", "nothing-like-it"], "there is no run 'nothing-like-it'"
    with pytest.raises(DeployError) as caught:
        rm(*names, yes=True)
    assert said in caught.value.text()
    for kept, directory in ((entry, run.path), (other, home / "runs/other")):
        assert registry.find(kept.run_id) == kept and kept.mirror.config.exists()
        assert (directory / "checkpoints/rl/step_000000/model.safetensors").exists()
    for lock in held:
        lock.close()


def test_files_that_another_run_shares_stay(home: Path) -> None:
    """Goal: trees of one project share files by hard links; one run's removal leaves the other's whole, and counts only
    what was freed. Red with the shared bytes counted."""
    _, run = make_run(home, "mine", checkpoints=0)
    _, next_run = make_run(home, "next", checkpoints=0)
    (next_run.code_tree / "reward.py").unlink()
    (run.code_tree / "big.bin").write_bytes(os.urandom(1 << 20))
    for name in ("reward.py", "big.bin"):
        os.link(run.code_tree / name, next_run.code_tree / name)
    (home / "code").mkdir()
    (home / "code/project").symlink_to(run.code_tree)
    (row,) = rm("mine", yes=True)
    assert row["bytes"] < 1 << 19 and (next_run.code_tree / "big.bin").stat().st_size == 1 << 20
    assert not os.path.lexists(home / "code/project"), "no link leads nowhere"


def test_a_host_that_cannot_be_reached(home: Path) -> None:
    """Goal: the message names the host, and nothing is half forgotten. Red with the record dropped first."""
    entry, _ = make_run(home, "mine")
    registry.save(dataclasses.replace(entry, target=f"127.0.0.1:{free_port()}"))
    with pytest.raises(DeployError, match=r"127\.0\.0\.1"):
        rm("mine", yes=True)
    assert (
        registry.find("mine") is not None
        and entry.mirror.config.exists()
        and entry.record.path.exists()
    )


def test_over_ssh(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: the command removes a host's run over SSH, by its programs alone, which the host need not have. Red with
    the sent program left out."""
    host = make_host()
    run = fill(RunDir(host.run_path("there")))
    found = laptop.deploy("rm", "there", "--remote", host.target)
    assert found.returncode == 2 and "only on" in found.stderr and run.path.exists()
    (row,) = laptop.json("rm", "there", "--remote", host.target, "--yes")
    assert row["bytes"] > 20_000 and not run.path.exists()
    assert json.loads(laptop.deploy("ls", "--json", "--remote", host.target).stdout) == []


def test_the_beginning_of_a_name_over_ssh(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: by the beginning of its name, or as `last`, a host's run goes like by its whole name: what would be lost
    is told first. Red with the host asked about the word as it was typed: `removed`, 0 bytes, and all still there."""
    host = make_host()
    for name, run_id in (("the", "there"), ("last", "newest")):
        run = fill(RunDir(host.run_path(run_id)))
        found = laptop.deploy("rm", name, "--remote", host.target)
        assert found.returncode == 2 and f"{run_id}: only on" in found.stderr and run.path.exists()
        (row,) = laptop.json("rm", name, "--remote", host.target, "--yes")
        assert row["run_id"] == run_id and row["bytes"] > 20_000 and not run.path.exists()
