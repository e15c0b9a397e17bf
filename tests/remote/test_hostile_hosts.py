"""What a host may do to a laptop: nothing but send files of a closed list into the mirror, and text to be shown."""

import base64
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import manifest_problems, write_manifest
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.run.checkpoints import pull_checkpoint
from rollouts.remote.run.connection import RetryPolicy
from rollouts.remote.run.follow import follow
from rollouts.remote.run.mirror import Mirror, pull_files
from rollouts.remote.run.pull import final_pull, pull
from rollouts.run_dir import RunDir, append_jsonl, write_json_atomic
from tests.remote.hosts import ROOT, Laptop, config_with, git, write_config
from tests.remote.test_follow import make_connection

NAMES = [
    *(
        "config.json",
        "plan.json",
        "mirror.json",
        ".gitignore",
        "secrets.json",
        "code/commit.txt",
        "code/tree/x.py",
    ),
    *(
        "weights/x",
        "checkpoints/sft/step_000001/x",
        "checkpoints/sft/latest",
        "",
        ".",
        "./events.jsonl",
        "logs//a.log",
    ),
    *(
        "logs/.hidden.log",
        "logs/a.log/b.log",
        "logs/../events.jsonl",
        "exit/../status.json",
        "logs/a\n.log",
        "logs/-.log",
    ),
    *(
        "events.jsonl\n",
        "EVENTS.jsonl",
        "logs/" + "a" * 300 + ".log",
        "exit/é.json",
        "exit/a.json.tmp",
        "processes/x.json",
    ),
]


def chunk(name: str, data: bytes = b"x", offset: int = 0) -> dict[str, Any]:
    return {"file": name, "offset": offset, "data": base64.b64encode(data).decode()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshot", [False, True])
def test_names_that_no_run_has(name: str, snapshot: bool, tmp_path: Path) -> None:
    """Goal: the stream writes a closed list of names. Red with every relative name without `..` taken."""
    mirror = Mirror(RunDir(tmp_path / "m"))
    message = {"file": name, "snapshot": "x"} if snapshot else chunk(name)
    with pytest.raises(DeployError, match="outside of the files that a run has"):
        mirror.apply(message)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [".gitignore"]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("logs/trainer.log", lambda here, out: (here / "logs").symlink_to(out)),
        (
            "logs/trainer.log",
            lambda here, out: [
                (here / "logs").mkdir(),
                (here / "logs/trainer.log").symlink_to(out / "f"),
            ],
        ),
        ("events.jsonl", lambda here, out: (here / "events.jsonl").symlink_to(out / "f")),
        ("exit/sft-trainer.json", lambda here, out: (here / "exit").symlink_to(out)),
        ("metrics.jsonl", lambda here, out: os.mkfifo(here / "metrics.jsonl")),
        ("logs/trainer.log", lambda here, out: (here / "logs").write_text("a file")),
        ("eval.jsonl", lambda here, out: (here / "eval.jsonl").mkdir()),
    ],
)
def test_nothing_is_written_through_a_link(
    name: str, make: Callable[[Path, Path], Any], tmp_path: Path
) -> None:
    """Goal: links, pipes and directories in a mirror are neither followed nor waited for.

    Red with the path opened as text: the files outside were written, and the pipe was waited for.
    """
    here, outside = tmp_path / "m", tmp_path / "outside"
    mirror = Mirror(RunDir(here))
    outside.mkdir()
    (outside / "f").write_text("mine")
    make(here, outside)
    message = {"file": name, "snapshot": "x"} if name.startswith("exit") else chunk(name, b"theirs")
    with pytest.raises(DeployError, match=r"not a plain file|a link or not a directory"):
        mirror.apply(message)
    assert [path.name for path in outside.iterdir()] == ["f"] and (
        outside / "f"
    ).read_text() == "mine"
    mirror.offsets(), list(mirror.rows(name)), mirror.new_text(name)


def test_a_snapshot_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    """Goal: status.json that is a link here becomes a file. Red with the text written through it."""
    mirror = Mirror(RunDir(tmp_path / "m"))
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "m/status.json").symlink_to(tmp_path / "mine")
    mirror.apply({"file": "status.json", "snapshot": "theirs"})
    assert (tmp_path / "mine").read_text() == "mine" and (
        tmp_path / "m/status.json"
    ).read_text() == "theirs"


def hostile_run(run: Path, outside: Path) -> None:
    """A run directory with links, devices, odd names and modes where plain files should be."""
    for name in (
        "logs",
        "exit",
        "code",
        "wandb/run-20260101_000000-abc/files",
        "evil",
        "processes",
    ):
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / "logs/trainer.log").write_text("log\n")
    (run / "logs/engine-0.log").symlink_to(outside / "f")
    (run / "logs/sub").mkdir()
    (run / "logs/sub/x.log").write_text("x")
    (run / "logs/bad name.log").write_text("x")
    os.mkfifo(run / "logs/pipe.log")
    (run / "exit/sft-trainer.json").write_text("{}")
    (run / "exit/sft-trainer.json").chmod(0o4777)
    (run / "code/environment-trainer.txt").write_text("torch==2\n")
    (run / "code/dirty.diff").write_text("theirs")
    (run / "wandb/run-20260101_000000-abc/files/output.log").write_text("w")
    (run / "wandb/settings").write_text("base_url = http://evil\n")
    (run / "wandb/latest-run").symlink_to("run-20260101_000000-abc")
    for name in ("config.json", "plan.json", "mirror.json", ".gitignore", "secrets.json", "evil/x"):
        (run / name).write_text("theirs")
    (run / "metrics.jsonl").write_text('{"step":1}\n')


def test_rsync_brings_plain_files_of_the_list_alone(tmp_path: Path) -> None:
    """Goal: the last pull brings what a run has, as plain files of this user's own, and nothing else.

    Red with -rlpt and a list of what is not pulled: links, set-uid bits, plan.json and evil/x arrived.
    """
    run, here, outside = tmp_path / "run", RunDir(tmp_path / "m"), tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("mine")
    hostile_run(run, outside)
    refused = pull_files(LocalTransport(), str(run), here)
    found = {
        path.relative_to(here.path).as_posix() for path in here.path.rglob("*") if not path.is_dir()
    }
    assert found == {
        *(
            ".gitignore",
            "metrics.jsonl",
            "logs/trainer.log",
            "exit/sft-trainer.json",
            "code/environment-trainer.txt",
        ),
        "wandb/run-20260101_000000-abc/files/output.log",
    }
    assert (
        "logs/bad name.log" in refused
        and "logs/engine-0.log" in refused
        and "logs/pipe.log" in refused
    )
    modes = {stat.S_IMODE((here.path / name).stat().st_mode) for name in found - {".gitignore"}}
    assert modes == {0o600} and (here.path / ".gitignore").read_text() == "*\n"


def test_rsync_does_not_write_through_links_here(tmp_path: Path) -> None:
    """Goal: a link in the mirror, of an earlier version's pull, leads nowhere. Red with rsync into the mirror."""
    run, here, outside = tmp_path / "run", RunDir(tmp_path / "m"), tmp_path / "outside"
    outside.mkdir()
    hostile_run(run, outside)
    here.path.mkdir()
    (here.path / "logs").symlink_to(outside)
    (here.path / "exit").mkdir()
    (outside / "f").write_text("mine")
    (here.path / "exit/sft-trainer.json").symlink_to(outside / "f")
    assert "logs/trainer.log" in pull_files(LocalTransport(), str(run), here)
    assert [path.name for path in outside.iterdir()] == ["f"] and (
        outside / "f"
    ).read_text() == "mine"
    assert not (here.path / "exit/sft-trainer.json").is_symlink()


def make_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    write_manifest(directory)
    return directory


PATHS = [
    *(
        ".",
        "..",
        "",
        "/etc",
        "checkpoints",
        "checkpoints/sft",
        "checkpoints/sft/latest",
        "checkpoints/sft/step_1",
    ),
    *(
        "checkpoints/sft/../../x",
        "checkpoints/evil/step_000001",
        "checkpoints/sft/step_000001/x",
        "logs/step_000001",
    ),
    *(
        "checkpoints/sft/step_000001\n",
        "checkpoints/sft/step_٠٠٠٠٠١",
        "checkpoints/sft/step_0000001234567890",
    ),
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_are_no_checkpoint(path: str, tmp_path: Path) -> None:
    """Goal: checkpoints/<stage>/step_<number>, nothing else. Red with any relative path."""
    with pytest.raises(DeployError, match="outside"):
        pull_checkpoint(LocalTransport(), str(tmp_path), RunDir(tmp_path / "m"), path)
    assert not (tmp_path / "m").exists()


def manifest_entry(directory: Path, name: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": ""}
    (directory / "manifest.json").write_text(json.dumps(manifest))


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a file that is not listed": lambda d: (d / "x.py").write_text("import os"),
    "a link": lambda d: (d / "x").symlink_to("/etc"),
    "a link that is listed": lambda d: [
        (d / "x").symlink_to("model.safetensors"),
        write_manifest(d),
    ],
    "a pipe": lambda d: os.mkfifo(d / "x"),
    "a name outside": lambda d: manifest_entry(d, "../../../x"),
    "an absolute name": lambda d: manifest_entry(d, "/etc/hostname"),
    "a manifest that is a link": lambda d: [
        shutil.move(d / "manifest.json", d / "m"),
        (d / "manifest.json").symlink_to("m"),
    ],
    "a manifest of another form": lambda d: (d / "manifest.json").write_text('{"files": ["a"]}'),
    "a nested manifest": lambda d: [(d / "a").mkdir(), (d / "a/manifest.json").write_text("{}")],
    "a manifest of a size without end": lambda d: (d / "manifest.json").write_text(
        '{"files": {"a": {"size": 1e999, "sha256": ""}}}'
    ),
    "a manifest too deep": lambda d: (d / "manifest.json").write_text("[" * 200_000),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_checkpoints(how: str, tmp_path: Path) -> None:
    """Goal: what a manifest does not vouch for makes a checkpoint damaged, here and where it is loaded; no link of it
    arrives. Red with only the listed files looked at."""
    host, here = tmp_path / "host", RunDir(tmp_path / "m")
    directory = make_checkpoint(host / "checkpoints/sft/step_000001")
    HOSTILE[how](directory)
    assert manifest_problems(directory)
    try:
        arrived = pull_checkpoint(LocalTransport(), str(host), here, "checkpoints/sft/step_000001")
    except DeployError as error:
        assert "damaged" in str(error)
        assert not (here.checkpoints / "sft/step_000001").exists()
    else:  # links and pipes did not come, and the rest is whole
        assert how in ("a link", "a pipe") and manifest_problems(arrived) == ()
    assert [p for p in here.path.rglob("*") if p.is_symlink() and p.name != "latest"] == []


def test_a_checkpoint_whose_stage_is_a_link_here(tmp_path: Path) -> None:
    """Goal: rsync is not sent through a link of the mirror. Red with the path made by mkdir(parents=True)."""
    host, here, outside = tmp_path / "host", RunDir(tmp_path / "m"), tmp_path / "outside"
    make_checkpoint(host / "checkpoints/sft/step_000001")
    (here.path / "checkpoints").mkdir(parents=True)
    outside.mkdir()
    (here.path / "checkpoints/sft").symlink_to(outside)
    with pytest.raises(DeployError, match="a link or not a directory"):
        pull_checkpoint(LocalTransport(), str(host), here, "checkpoints/sft/step_000001")
    assert list(outside.iterdir()) == []


def test_an_offset_without_end_is_a_damaged_message(tmp_path: Path) -> None:
    """Goal: a number that JSON allows and no file has ends the connection, not the command. Red with OverflowError."""
    with pytest.raises(TransportError, match="damaged message"):
        Mirror(RunDir(tmp_path / "m")).apply({**chunk("events.jsonl"), "offset": float("inf")})


def lying_python(tmp_path: Path, lines: list[str]) -> str:
    """A host's python whose `tail` prints `lines`."""
    (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat {tmp_path}/lines\n")
    script.chmod(0o755)
    return str(script)


def test_a_stream_of_lies_costs_what_it_touches(tmp_path: Path) -> None:
    """Goal: odd names, noise and odd ends are left out and counted; the rest arrives. Red with the first one raised."""
    rows = [
        *("Welcome to gpu-7", "\x1b]0;title\x07", "[]", "17", "null", '{"x": 1}', "[" * 100_000),
        *(
            json.dumps(m)
            for m in (chunk("config.json"), chunk("../x"), {"file": ["a"], "snapshot": "x"})
        ),
        json.dumps({"file": "status.json", "snapshot": "x" * 2_000_000}),
        json.dumps(chunk("metrics.jsonl", b'{"step":1}\n')),
        json.dumps({"ended": True, "state": "\x1b[2J" * 100, "exit_code": "0"}),
    ]
    connection = make_connection(tmp_path, lying_python(tmp_path, rows))
    mirror = Mirror(connection.entry.mirror)
    ended = follow(connection, mirror, lambda file: None, lambda phase, text: None, RetryPolicy())
    assert ended["exit_code"] is None and len(ended["state"]) <= 40
    assert (
        connection.entry.mirror.metrics.read_text() == '{"step":1}\n'
        and not (connection.entry.mirror.path / "config.json").exists()
    )
    assert mirror.left_out["lines of the connection that are not messages"] == 7
    assert sum(count for what, count in mirror.left_out.items() if what.startswith("pieces")) == 4


# --- what a launch uses ---------------------------------------------------------------------------------------------


def planted_run(
    laptop: Laptop, run_id: str, *, status: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A run directory on this machine that no deploy here made, as a host would show it."""
    run = RunDir(laptop.rollouts_home / "runs" / run_id)
    fields = {
        "run_id": run_id,
        "experiment_name": "example",
        "state": "starting",
        "stage": None,
        "message": "m",
    }
    fields |= {
        "started_at": 1.0,
        "updated_at": time.time(),
        "exit_code": None,
        **(status or {}),
    }
    write_json_atomic(run.status, fields)
    write_json_atomic(run.config, config_with(changes).to_json())
    plan = {
        "run_id": run_id,
        "experiment_name": "example",
        "home": str(laptop.rollouts_home),
        "run_path": str(run.path),
    }
    plan |= {
        "base_python": sys.executable,
        "environments": [],
        "stages": [],
        "bootstrap_timeout_s": 60.0,
    }
    plan |= {"stop_grace_s": 1e12, "engine_restarts_max": 0, "engine_hang_timeout_s": 1.0}
    write_json_atomic(run.plan, plan)
    run.code.mkdir()
    run.code_tree.symlink_to(ROOT)
    return run.path


def test_an_adopted_run_is_never_launched(laptop: Laptop) -> None:
    """Goal: a host that says "not launched yet" and names secrets gets neither code nor secrets. Red with the launch
    decided by the host's row, from the host's config: the value was in the run's secrets.json."""
    run = planted_run(laptop, "ev", **{"host.secrets": ["AWS_SECRET_ACCESS_KEY"]})
    done = laptop.deploy("attach", "ev", env={"AWS_SECRET_ACCESS_KEY": "s3cr3t-91"})
    assert (
        done.returncode == 2
        and "started elsewhere" in done.stderr
        and "Nothing was started." in done.stderr
    )
    assert not (run / "secrets.json").exists() and (run / "code/tree").is_symlink()


@pytest.mark.parametrize("name", ["../../evil", "a/b", "x" * 60, "", ".ssh", "a\nb"])
def test_names_of_an_adopted_run_are_checked(name: str, laptop: Laptop) -> None:
    """Goal: where a mirror lies is decided here. Red with experiment_name taken as it came."""
    planted_run(laptop, "ev", status={"experiment_name": name, "state": "done"})
    done = laptop.deploy("pull", "ev")
    assert done.returncode == 2 and "needed" in done.stderr and "Traceback" not in done.stderr
    assert not list(laptop.project.rglob("mirror.json")) and not list(
        laptop.home.rglob("mirror.json")
    )


def test_an_adopted_mirror_lies_under_this_machines_own_directory(laptop: Laptop) -> None:
    """Goal: save_dir of the host's config has no effect here, and its config is not deployed as it is. Red with the
    mirror at <save_dir>, and with `deploy <mirror>/config.json` sending what that config names, after a pull or after
    any other verb."""
    planted = laptop.home / ".config" / "autostart"
    changes = {"output.save_dir": str(planted), "host.secrets": ["TOKEN_FOR_TEST"]}
    planted_run(laptop, "ev", status={"state": "done", "exit_code": 0}, **changes)
    mirror = laptop.project / "runs/example/ev"
    for verb in ("logs", "stop", "pull"):  # whichever brings it here first
        laptop.deploy(verb, "ev")
        assert mirror.is_dir() and not planted.exists()
        for path in (mirror, mirror / "config.json"):
            again = laptop.deploy(str(path), "--plan", env={"TOKEN_FOR_TEST": "x"})
            assert again.returncode == 2 and "came from a host" in again.stderr, verb
        if verb != "pull":
            shutil.rmtree(mirror)
            laptop.deploy("forget", "ev")
    shutil.rmtree(laptop.rollouts_home / "runs/ev")
    assert "deploy a copy of it" in laptop.deploy("attach", "ev").stderr, (
        "that config is refused where it lies"
    )


def test_a_launch_uses_this_machines_record(laptop: Laptop) -> None:
    """Goal: what lies in the mirror does not reach a launch. Red with the mirror's config read:
    the variable's value arrived."""
    config = str(write_config(laptop.project, output__mode="sft"))
    tools = laptop.home / "tools"
    tools.mkdir()
    (tools / "rsync").write_text("#!/bin/sh\nexit 5\n")
    (tools / "rsync").chmod(0o755)
    failed = laptop.deploy(
        config, "--run-id", "kept", env={"PATH": f"{tools}:{os.environ['PATH']}"}
    )
    assert failed.returncode == 2, failed.stdout + failed.stderr
    mirror, run = RunDir(laptop.project / "runs/example/kept"), laptop.rollouts_home / "runs/kept"
    evil = config_with({"host.secrets": ["GITHUB_TOKEN"], "output.mode": "sft"})
    write_json_atomic(mirror.config, evil.to_json())
    (mirror.path / "code/dirty.diff").write_text("evil")
    done = laptop.deploy("attach", "kept", env={"GITHUB_TOKEN": "s3cr3t-17"})
    assert done.returncode == 0, done.stdout + done.stderr
    ran = json.loads((run / "config.json").read_text())
    assert ran["host"]["secrets"] == [] and "evil" not in (run / "code/dirty.diff").read_text()
    assert json.loads(mirror.config.read_text())["host"]["secrets"] == []


def test_mirror_and_registry_are_for_this_user_alone(laptop: Laptop) -> None:
    """Goal: 0700 from the first moment, whatever the umask. Red with mkdir's default until the last pull."""
    config = str(write_config(laptop.project, output__mode="sft"))
    done = laptop.deploy(config, "--run-id", "mine", "--detach", preexec_fn=lambda: os.umask(0))
    assert done.returncode == 0, done.stderr
    for path in (laptop.project / "runs/example/mine", laptop.rollouts_home / "registry"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((laptop.rollouts_home / "registry/mine.json").stat().st_mode) == 0o600
    assert laptop.deploy("attach", "mine").returncode == 0
    assert git(laptop.project, "status", "--porcelain") == ""


def test_pull_and_last_pull_go_by_the_same_list(tmp_path: Path) -> None:
    """Goal: a hostile run that has ended is pulled, with one note of what was left out. Red with a traceback of the
    first odd thing."""
    connection = make_connection(tmp_path)
    run = Path(connection.entry.run_path)
    (tmp_path / "outside").mkdir()
    shutil.rmtree(run / "code")
    hostile_run(run, tmp_path / "outside")
    (run / "code/tree").symlink_to(ROOT)
    append_jsonl(
        run / "events.jsonl",
        {"kind": "checkpoint", "path": "."},
        {"kind": "checkpoint"},
        {"kind": ["x"]},
    )
    make_checkpoint(run / "checkpoints/sft/step_000001")
    append_jsonl(
        run / "events.jsonl", {"kind": "checkpoint", "path": "checkpoints/sft/step_000001"}
    )
    said: list[str] = []
    assert pull(connection, lambda phase, text: said.append(text)).state == "done"
    final_pull(connection, lambda phase, text: said.append(text))
    assert (connection.entry.mirror.checkpoints / "sft/step_000001/manifest.json").exists()
    assert (
        len(said) == 2
        and "not plain files" in said[0]
        and "lack a field" in said[0]
        and "1 checkpoints outside" in said[1]
    )
