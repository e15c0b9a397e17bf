"""`deploy gc` on a host: what it says it would free is what it frees, and what lives is not touched.

Files and locks are real; a run's life is its lock."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rollouts.manifest import write_manifest
from rollouts.run_dir import (
    EnvironmentSpec,
    RunDir,
    Status,
    hold_lock,
    host_identity,
    write_json_atomic,
)
from rollouts.run_dir.results import copies_in, results_of
from rollouts.worker import collect
from rollouts.worker.collect import Home, Item
from tests.remote.test_gone_runs import launch_plan

DAY_S = 86_400.0
OLD_S = 14 * DAY_S
ENDED = ("done", "failed", "died")
RUNS = st.lists(
    st.fixed_dictionaries(
        {
            "state": st.sampled_from(
                [*ENDED, "live", "starting", "launching", "uploading", "silent", "left"]
            ),
            "days": st.integers(0, 30),
            "shares": st.booleans(),  # its tree's files are links to those of the run before
            "last": st.booleans(),  # the next upload of a project goes on from its tree
            "parts": st.sets(st.sampled_from(["weights", "build", "package"])),
            # what lies on the laptop of its checkpoint
            "checkpoint": st.sampled_from(["", "alone", "copied", "other", "linked", "not whole"]),
            "kib": st.integers(1, 200),
            "environment": st.integers(0, 15),  # from 4 on one that is not there any more
            "reads": st.integers(
                0, 40
            ),  # the run whose checkpoint its config names; none from 20 on
            "starts": st.booleans(),  # between the look and the removal
        }
    ),
    min_size=20,
    max_size=20,
)
ENVIRONMENTS = st.lists(
    st.fixed_dictionaries(
        {
            "days": st.integers(0, 30),
            "locked": st.sampled_from([False, False, False, True]),
            "whole": st.sampled_from([True, True, True, False]),
            "starts": st.booleans(),  # to be made, between the look and the removal
        }
    ),
    min_size=4,
    max_size=4,
)
CHECKPOINT = "checkpoints/rl/step_000001"


class World:
    """A home on this machine: 20 runs and 4 environments, with the locks that a host's processes would hold."""

    def __init__(
        self, directory: Path, runs: list[dict[str, Any]], environments: list[dict[str, Any]]
    ) -> None:
        self.home, self.mirrors = directory / "home", directory / "mirrors"
        self.runs = [DEFAULTS | run for run in runs]
        self.environments = [{"starts": False} | shape for shape in environments]
        self.have: dict[str, dict[str, str]] = {}
        self.held = contextlib.ExitStack()
        for number, shape in enumerate(environments):
            self._environment(self.home / f"envs/key{number}", shape)
        for number, shape in enumerate(self.runs):
            self._run(number, shape)

    @property
    def aside(self) -> Path:
        return self.home / "removed/run-99-0123abcd"

    def leave(self, path: Path) -> None:
        """Leave something there, as what was killed does."""
        path.mkdir(parents=True)
        (path / "left").write_bytes(os.urandom(5000))

    def run(self, number: int) -> RunDir:
        return RunDir(self.home / f"runs/run-{number:02d}")

    def _environment(self, path: Path, shape: dict[str, Any]) -> None:
        (path / "bin").mkdir(parents=True)
        (path / "bin/big").write_bytes(os.urandom(300_000))
        (path / "bin/link").symlink_to("/usr/bin/env")
        path.with_name(f".{path.name}.lock").touch()
        if shape["whole"]:
            (path / ".complete").write_text("{}")
            moment = time.time() - shape["days"] * DAY_S
            os.utime(path / ".complete", (moment, moment))
        if shape["locked"]:
            self._lock(path)

    def _lock(self, path: Path) -> None:
        lock = self.held.enter_context((path.with_name(f".{path.name}.lock")).open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)

    def _run(self, number: int, shape: dict[str, Any]) -> None:
        run, state = self.run(number), shape["state"]
        size = shape["kib"] * 1024
        run.code_tree.mkdir(parents=True)
        before = self.run(number - 1).code_tree / "data.bin"
        if shape["shares"] and before.exists():
            os.link(before, run.code_tree / "data.bin")
        else:
            (run.code_tree / "data.bin").write_bytes(os.urandom(size))
        parts = {
            "weights": run.weights,
            "build": run.code / ".tree-build-1",
            "package": run.code_package,
        }
        for name in shape["parts"] & parts.keys():
            parts[name].mkdir()
            (parts[name] / "file").write_bytes(os.urandom(size))
        if shape["last"]:
            (self.home / "code").mkdir(exist_ok=True)
            (self.home / f"code/project-{number}").symlink_to(run.code_tree)
        if shape["checkpoint"]:
            self._checkpoint(run, size, shape["checkpoint"])
        if state == "uploading":
            return
        path = self.home / f"envs/key{shape['environment']}"
        spec = EnvironmentSpec(
            name="trainer", path=str(path), installer="pip", base_python="", requirements=[],
            requirements_no_deps=[], constraints="",
        )  # fmt: skip
        plan = dataclasses.replace(launch_plan(self.home, run.run_id), environments=[spec])
        write_json_atomic(run.plan, plan)
        write_json_atomic(run.config, {"model": str(self.run(shape["reads"]).path / CHECKPOINT)})
        host = {"name": "other", "boot": "other"} if state == "silent" else host_identity()
        write_json_atomic(run.launch, {"launch_id": None, "host": host})
        self._status(run, state, shape["days"])

    def _checkpoint(self, run: RunDir, size: int, copy: str) -> None:
        directory = run.path / CHECKPOINT
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(os.urandom(size))
        write_manifest(directory)
        if copy == "linked":
            self.mirrors.mkdir(exist_ok=True)
            for file in directory.iterdir():
                os.link(file, self.mirrors / f"{run.run_id}-{file.name}")
        if copy != "alone":
            self.have[run.run_id] = results_of(run)
        if copy == "other":
            self.have[run.run_id][CHECKPOINT] = f"sha256 {'0' * 64}"
        if copy == "not whole":
            (directory / "model.safetensors").write_bytes(b"")

    def _status(self, run: RunDir, state: str, days: int) -> None:
        ends = state in ("done", "failed", "launching", "left")
        now = time.time() - (0 if state == "starting" else days * DAY_S)
        status = Status(
            run_id=run.run_id, experiment_name="example", state="done" if ends else "running", stage="rl", message="",
            started_at=now, updated_at=now, exit_code=0 if ends else None,
        )  # fmt: skip
        write_json_atomic(run.status, status)
        if state == "live":
            self._hold(run)
        elif state == "launching":  # as `launching` holds it
            descriptor = os.open(run.path, os.O_RDONLY)
            self.held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif state != "starting":
            run.lock.touch()
        if state == "left":  # a process outlived it
            mark = {"ROLLOUTS_RUN_PATH": str(run.path), "ROLLOUTS_RUN_ID": run.run_id}
            process = subprocess.Popen(["sleep", "600"], env={**os.environ, **mark})
            self.held.callback(process.wait)
            self.held.callback(process.kill)

    def _hold(self, run: RunDir) -> None:
        lock = hold_lock(run)
        assert lock is not None
        self.held.enter_context(lock)

    def start(self) -> None:
        """Start again those runs that ended, and the making of those environments, that are to start now."""
        for number, made in enumerate(self.environments):
            if made["starts"] and not made["locked"]:
                self._lock(self.home / f"envs/key{number}")
                made["locked"] = True
        for number, shape in enumerate(self.runs):
            if shape["starts"] and shape["state"] in ENDED:
                run = self.run(number)
                self._hold(run)
                status = json.loads(run.status.read_text())
                write_json_atomic(run.status, status | {"state": "running", "exit_code": None})
                shape["state"] = "live"

    def look(self, *, ahead_s: float = 0.0) -> list[Item]:
        now = time.time() + ahead_s
        return Home(self.home, older_than_s=OLD_S, have=self.have, now=now).items()

    def free(self) -> list[str]:
        """What may go, by how this world was made; the same question as `look`'s, answered without it."""
        lives = [run for run in self.runs if run["state"] in ("live", "starting", "silent")]
        read = {run["reads"] for run in lives}
        found = [self.aside] if self.aside.exists() else []
        for number, shape in enumerate(self.runs):
            if shape["state"] not in ENDED or shape["days"] < 14:
                continue
            run = self.run(number)
            found += [] if shape["last"] else [run.code_tree]
            found += [run.weights] if "weights" in shape["parts"] else []
            found += [run.code_package] if "package" in shape["parts"] else []
            is_free = shape["checkpoint"] == "copied" and number not in read
            found += [run.path / CHECKPOINT] if is_free else []
        for number, shape in enumerate(self.environments):
            uses = [run for run in self.runs if run["environment"] == number]
            uses = [run for run in uses if run["state"] != "uploading"]
            is_old = all(run["days"] >= 14 for run in uses) and shape["days"] >= 14
            is_free = is_old and shape["whole"] and not shape["locked"]
            if is_free and not any(run in lives for run in uses):
                found.append(self.home / f"envs/key{number}")
        return sorted(map(str, found))

    def kept(self, removed: list[str]) -> dict[str, str]:
        """Every file that is not in what was removed, with its content."""
        files = [file for file in sorted(self.home.rglob("*")) if file.is_file()]
        stay = [f for f in files if not any(f.is_relative_to(path) for path in removed)]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in stay}


DEFAULTS = {
    "parts": set(), "checkpoint": "", "last": False, "reads": 99, "starts": False, "shares": False
}  # fmt: skip


def used_bytes(directory: Path) -> int:
    """What a directory takes, as `du` counts it."""
    seen = {}
    for place, _, names in os.walk(directory):
        for path in (place, *(os.path.join(place, name) for name in names)):
            found = os.lstat(path)
            seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)  # no shrinking
@given(runs=RUNS, environments=ENVIRONMENTS)
def test_any_host_gives_back_what_was_said_and_keeps_the_rest(
    runs: list[dict[str, Any]], environments: list[dict[str, Any]]
) -> None:
    """Goal: over random hosts exactly what may go is listed, and goes, but for what a run that starts meanwhile uses;
    no other file changes; the sum told is the room given back, to 1 %; a second look finds nothing more."""
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name), runs, environments)
        with world.held:
            world.leave(world.aside)
            world.leave(world.home / "previews/0123abcd")  # just now: it may be under way
            before = used_bytes(world.home)
            free = [item for item in world.look() if not item.keep]
            assert sorted(item.path for item in free) == world.free()
            told = collect.freed_bytes([Path(item.path) for item in free])
            assert used_bytes(world.home) == before, "a look changes nothing"
            world.start()
            going = world.free()
            kept = world.kept(going)
            done = collect.remove(world.home, free)
            assert sorted(done["removed"]) == going
            assert len(done["problems"]) == len(free) - len(going)
            freed = before - used_bytes(world.home)
            assert abs(freed - done["bytes"]) <= 0.01 * freed + 8192  # launch.lock is new
            assert done["bytes"] == told or len(going) < len(free)
            assert world.kept([str(world.home / "launch.lock")]) == kept
            assert [item for item in world.look() if not item.keep] == []


def test_each_kind_is_found_and_each_reason_said(tmp_path: Path) -> None:
    """Goal: a tree, an export, a copied checkpoint, an unused environment and an upload that broke off may go; what is
    used lately, is the only copy, or is under way stays, with the reason. Red with --older-than not asked."""
    shape = {"state": "done", "days": 20, "kib": 10, "environment": 0}
    runs = [
        shape | {"parts": {"weights", "build", "package"}, "checkpoint": "copied"},
        shape | {"checkpoint": "alone"},
        shape | {"days": 1},
        shape | {"state": "uploading"},
    ]
    unlocked = {"days": 30, "locked": False, "whole": True}
    world = World(
        tmp_path,
        runs,
        [unlocked, unlocked, unlocked | {"locked": True}, unlocked | {"whole": False}],
    )
    for name in ("previews/0123abcd", "previews/theirs"):
        world.leave(world.home / name)
    with world.held:
        found = {
            (item.kind, item.path.removeprefix(f"{world.home}/")): item.keep
            for item in world.look()
        }
        assert {kind for kind, _ in found} == {
            "code",
            "weights",
            "checkpoint",
            "upload",
            "environment",
        }
        assert [where for (_, where), keep in found.items() if not keep] == [
            "runs/run-00/code/tree",
            "runs/run-00/code/package",
            "runs/run-00/weights",
            "runs/run-00/checkpoints/rl/step_000001",
            "runs/run-01/code/tree",
            "envs/key1",
        ]
        assert found["checkpoint", "runs/run-01/checkpoints/rl/step_000001"].startswith(
            "the only copy"
        )
        assert found["upload", "runs/run-03"] == "an upload may be under way"
        assert found["upload", "previews/0123abcd"] == "an upload may be under way"
        assert (
            found["code", "runs/run-02/code/tree"]
            == found["environment", "envs/key0"]
            == "used lately"
        )
        assert found["environment", "envs/key2"] == "it is being made"
        later = [item for item in world.look(ahead_s=15 * DAY_S) if item.kind == "upload"]
        assert [item.keep for item in later] == ["", "", ""] and len(world.look()) == len(found)


def test_a_run_that_starts_between_the_look_and_the_removal(tmp_path: Path) -> None:
    """Goal: what became live since the list was made stays, and is named. Red with the list removed as it was."""
    shape = {
        "state": "done",
        "days": 20,
        "shares": False,
        "kib": 10,
        "environment": 0,
        "parts": set(),
    }
    world = World(tmp_path, [shape, shape], [{"days": 30, "locked": False, "whole": True}] * 4)
    free = [item for item in world.look() if not item.keep]
    first = RunDir(world.home / "runs/run-00")
    with hold_lock(first) as _:  # type: ignore[union-attr]
        status = json.loads(first.status.read_text())
        write_json_atomic(first.status, status | {"state": "running", "exit_code": None})
        done = collect.remove(world.home, free)
    assert first.code_tree.exists() and (world.home / "envs/key0").exists()
    assert (
        not (world.home / "runs/run-01/code/tree").exists()
        and not (world.home / "envs/key1").exists()
    )
    assert len(done["problems"]) == 2 and "stays: it is running" in done["problems"][0]


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Goal: a home whose folders are links, to a shared disk say, is left alone, and what a link in it leads to stays.
    Red with links taken for folders."""
    shape = {
        "state": "done",
        "days": 20,
        "shares": False,
        "kib": 10,
        "environment": 0,
        "parts": {"weights"},
    }
    world = World(tmp_path, [shape], [{"days": 30, "locked": False, "whole": True}] * 4)
    (world.home / "envs").rename(tmp_path / "shared")
    (world.home / "envs").symlink_to(tmp_path / "shared")
    weights = world.home / "runs/run-00/weights"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    free = [item for item in world.look() if not item.keep]
    assert [item.kind for item in free] == ["code"]
    collect.remove(world.home, free)
    assert (tmp_path / "elsewhere/file").exists() and (tmp_path / "shared/key1/bin/big").exists()


def test_what_others_keep_in_folders_of_these_names(tmp_path: Path) -> None:
    """Goal: in a home that is a person's own directory, their environments, the runs of other programs and what they
    put away stay, and are not even listed. Red with each of the three taken for ours by its folder alone."""
    places = (
        "envs/mine/bin/python",
        "runs/theirs/config.json",
        "runs/other/code/train.py",
        "removed/photos/1.jpg",
    )
    for name in places:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    items = Home(tmp_path, older_than_s=0.0, have={}, now=time.time() + 99 * DAY_S).items()
    assert items == [] and not (tmp_path / "envs/.mine.lock").exists()
    (tmp_path / "runs/other/code/.tree-1").mkdir()
    (tmp_path / "removed/run-0123abcd").mkdir()
    items = Home(tmp_path, older_than_s=0.0, have={}, now=time.time() + 99 * DAY_S).items()
    assert [(item.kind, item.keep) for item in items] == [("upload", ""), ("removed", "")]


def test_a_link_is_no_copy(tmp_path: Path) -> None:
    """Goal: a mirror that only links to the run's own checkpoint holds no second copy of it. Red with `results_of`."""
    run, mirror = RunDir(tmp_path / "run"), RunDir(tmp_path / "mirror")
    checkpoint = run.checkpoints / "sft/step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    write_manifest(checkpoint)
    own = list(copies_in(run))
    assert own == ["checkpoints/sft/step_000001"]
    mirror.path.mkdir()
    mirror.checkpoints.symlink_to(run.checkpoints)
    assert list(results_of(mirror)) == own and copies_in(mirror) == {}
    (tmp_path / "linked").symlink_to(run.path)
    assert copies_in(RunDir(tmp_path / "linked")) == {}


def test_a_live_run_whose_plan_is_gone(tmp_path: Path) -> None:
    """Goal: nothing says what a live run uses whose plan.json, or config.json, is gone or no file: so environments,
    trees and checkpoints of other runs stay, with that reason, also where it went after the look; once the run ended,
    they may go. Red with a plan that cannot be read taken for one that names nothing."""
    shape = {"state": "done", "days": 20, "kib": 10, "environment": 9}
    runs = [shape | {"checkpoint": "copied"}, shape | {"state": "live", "environment": 0}]
    unused = {"days": 30, "locked": False, "whole": True}
    world = World(tmp_path, runs, [unused, unused])
    live = world.run(1)
    with world.held:
        before = [item for item in world.look() if not item.keep]
        assert [Path(item.path).name for item in before] == ["tree", "step_000001", "key1"]
        for file in (live.config, live.plan):
            text = file.read_text()
            for damage in (Path.unlink, Path.mkdir):
                if damage is Path.mkdir:
                    file.mkdir()
                else:
                    file.unlink()
                why = f"the live run run-01 may use it: its {file.name} cannot be read"
                kept = {item.path: item.keep for item in world.look()}
                assert [kept[item.path] for item in before] == [why] * 3
                assert kept[str(world.home / "envs/key0")] in (why, "the live run run-01 uses it")
                done = collect.remove(world.home, before)
                assert done["removed"] == [] and why in done["problems"][0]
            file.rmdir()
            file.write_text(text)
        live.plan.unlink()
    assert {item.path for item in before} < {
        item.path for item in world.look() if not item.keep
    } | {str(live.path)}
