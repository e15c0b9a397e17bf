"""`deploy resume`: what it refuses, what it starts from, and what the new run's record says; torch is stood in for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.config import Config
from rollouts.manifest import write_manifest
from rollouts.remote.errors import DeployError
from rollouts.remote.resume import FIXED, with_settings
from rollouts.remote.run import registry
from rollouts.remote.run.resumable import Origin, find_origin, rows_before
from rollouts.run_dir import RunDir, append_event, append_jsonl, read_jsonl
from tests.example_config import example_config
from tests.remote.hosts import Host, Laptop, wait_for, write_config


def checkpoint(run: RunDir, stage: str, step: int, *, damaged: bool = False) -> None:
    directory = run.checkpoints / stage / f"step_{step:06d}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    write_manifest(directory)
    if damaged:
        (directory / "model.safetensors").write_bytes(b"weighty")


def mirror(
    path: Path,
    *,
    sft: int = 0,
    rl: int = 0,
    ended: tuple[str, ...] = (),
    damaged: tuple[int, ...] = (),
) -> RunDir:
    """The mirror of a run of 4 steps a stage, with a checkpoint at each of the first `sft` and `rl` steps."""
    run = RunDir(path)
    path.mkdir()
    for stage, steps in (("sft", sft), ("rl", rl)):
        append_event(run, "training_started", stage=stage, step=0, steps_total=4)
        for step in range(1, steps + 1):
            checkpoint(run, stage, step, damaged=step in damaged)
            append_jsonl(run.metrics, {"stage": stage, "step": step, "loss": 1.0 / step})
        if stage in ended:
            append_event(run, "stage_ended", stage=stage, seconds=1.0)
    return run


FOUND: list[tuple[dict[str, Any], tuple[str, int, tuple[str, ...]]]] = [
    ({"sft": 2}, ("sft", 2, ("sft", "rl"))),
    ({"sft": 3, "damaged": (3,)}, ("sft", 2, ("sft", "rl"))),
    # its last evaluation is missing: the last step is done again
    ({"sft": 4}, ("sft", 3, ("sft", "rl"))),
    ({"sft": 4, "ended": ("sft",)}, ("sft", 4, ("rl",))),
    ({"sft": 4, "ended": ("sft",), "rl": 2}, ("rl", 2, ("rl",))),
    ({"sft": 4, "ended": ("sft",), "rl": 4}, ("rl", 3, ("rl",))),
    ({"sft": 4, "ended": ("sft",), "rl": 2, "damaged": (1, 2)}, ("sft", 4, ("rl",))),
]


@pytest.mark.parametrize(("made", "found"), FOUND, ids=[str(made) for made, _ in FOUND])
def test_where_a_run_goes_on(
    tmp_path: Path, made: dict[str, Any], found: tuple[str, int, tuple[str, ...]]
) -> None:
    """Goal: the newest whole checkpoint; a stage that had ended is not repeated, one that had not is finished; a
    damaged one is named. Red with the last step's checkpoint taken before its stage ended, and with damage not seen."""
    run = mirror(tmp_path / "r", **made)
    origin = find_origin(run, ("sft", "rl"))
    assert (origin.stage, origin.step, origin.stages) == found
    assert [
        note for note in origin.notes if "is damaged, and is left out: model.safetensors" in note
    ] or not made.get("damaged")
    kept = [
        (row["stage"], row["step"])
        for row in map(json.loads, rows_before(run, origin)["metrics.jsonl"].splitlines())
    ]
    assert kept == [
        ("sft", step)
        for step in range(1, (made["sft"] if origin.stage == "rl" else origin.step) + 1)
    ] + [("rl", step) for step in range(1, (origin.step if origin.stage == "rl" else 0) + 1)]


@pytest.mark.parametrize(
    ("made", "stages", "says"),
    [
        ({}, ("sft", "rl"), "has no whole checkpoint to go on from"),
        ({"sft": 2, "damaged": (1, 2)}, ("sft",), "step_000002 is damaged"),
        ({"sft": 4, "ended": ("sft",)}, ("sft",), "has taken its last step: sft step 4"),
    ],
)
def test_nothing_to_go_on_from(
    tmp_path: Path, made: dict[str, Any], stages: tuple[str, ...], says: str
) -> None:
    """Goal: one message, with the reason. Red with the newest directory taken unchecked."""
    with pytest.raises(DeployError) as error:
        find_origin(mirror(tmp_path / "r", **made), stages)
    assert says in error.value.text()


REFUSED = [
    ("model.name=other/Model", "model.name"),
    (
        "model.lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules='all-linear', init_seed=0)",
        "model.lora",
    ),
    (
        "sft.optimizer.muon=MuonConfig(momentum=0.9, nesterov=True, ns_steps=5, adjust_lr='match_rms_adamw',"
        " vector_lr=1e-3, width_reference=-1)",
        "sft.optimizer.muon",
    ),
    ("sft.target_examples_per_step=24", "sft.target_examples_per_step"),
    ("data.shuffle_seed=9", "data.shuffle_seed"),
    ("data.sft_mixture.0.max_samples=3", "data.sft_mixture"),
    ("output.mode=rl", "output.mode"),
]


@pytest.mark.parametrize(("setting", "names"), REFUSED, ids=[names for _, names in REFUSED])
def test_settings_that_a_resume_cannot_follow(tmp_path: Path, setting: str, names: str) -> None:
    """Goal: each is named with the fix; a learning rate may change. Red with FIXED and FIXED_OF_STAGE empty."""
    old = registry.RunEntry(
        run_id="r",
        experiment_name="e",
        target="local",
        home="/h",
        run_path="/h/runs/r",
        local_dir=str(tmp_path),
        repository="/",
        created_at=0.0,
    )
    origin = Origin("sft", 2, tmp_path, ("sft", "rl"))
    with pytest.raises(DeployError) as error:
        with_settings(old, example_config(), origin, [setting])
    assert f"an exact resume cannot follow a change of {names}" in error.value.text() and FIXED
    changed = with_settings(
        old, example_config(), origin, ["sft.matrix_lr=0.5", "rl.matrix_lr=0.25"]
    )
    assert changed.sft is not None and changed.sft.matrix_lr == 0.5


def stopped(laptop: Laptop, tmp_path: Path, *options: str) -> None:
    """A run `old` that was stopped in SFT after its first step, which has a checkpoint."""
    config = str(write_config(laptop.project, env={"STAND_IN_WAIT": str(tmp_path / "go")}))
    assert laptop.deploy(config, *options, "--run-id", "old", "--detach").returncode == 0
    wait_for(lambda: laptop.json("status", "old")["step"] == 1, "the first step")
    live = laptop.deploy("resume", "old")
    assert (
        live.returncode == 2
        and "old may be live" in live.stderr
        and "deploy attach old" in live.stderr
    )
    assert laptop.deploy("stop", "old").returncode == 0
    (tmp_path / "go").touch()


def here(laptop: Laptop, run_id: str) -> RunDir:
    return RunDir(laptop.project / "runs" / "example" / run_id)


def test_a_stopped_run_goes_on_on_another_host(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: the checkpoint is sent, whole; the record, launch.json and the rows tell of the run before; the old host
    need not answer; a plan pulls nothing, and says so, also where nothing else is here. Red with "start it anew", and
    with a stop that leaves no event on its host."""
    old_host, new_host = make_host(), make_host()
    stopped(laptop, tmp_path, "--remote", old_host.target)
    looked = laptop.deploy("resume", "old", "--plan")
    assert looked.returncode == 2 and "not here of old, so this plan leaves it out" in looked.stderr
    assert "fix     deploy pull old, then the plan" in looked.stderr
    assert not here(laptop, "old").checkpoints.exists()
    assert laptop.deploy("pull", "old").returncode == 0
    assert '"kind":"stop_asked"' in here(laptop, "old").events.read_text()
    old_host.stop()
    plan = laptop.json("resume", "old", "--remote", new_host.target, "--plan")
    assert plan["resumed_from"] == {
        "run_id": "old",
        "stage": "sft",
        "step": 2,  # stop had it save one
        "checkpoint": "checkpoints/sft/step_000002",
    }
    done = laptop.deploy("resume", "old", "--remote", new_host.target, "--run-id", "new")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "So whether old ended is not known" in done.stderr
    run = RunDir(new_host.run_path("new"))
    start = run.path / "start" / "sft-step_000002"
    config = Config.load(run.config)
    assert config.output.source_checkpoint == str(start) and config.output.mode == "sft+rl"
    old = here(laptop, "old").checkpoints / "sft" / "step_000002"
    assert (start / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    assert json.loads(run.launch.read_text())["resumed_from"]["run_id"] == "old"
    assert read_jsonl(run.metrics)[0] == read_jsonl(here(laptop, "old").metrics)[0]
    assert here(laptop, "new").metrics.read_bytes() == run.metrics.read_bytes()
    entry = json.loads((laptop.rollouts_home / "registry" / "new.json").read_text())
    assert entry["resumed_from"]["checkpoint"] == "checkpoints/sft/step_000002"
    assert "stage=sft step=1/3 loss=1.0" not in done.stdout.split("run: new on")[0]
    ended = laptop.deploy("resume", "new")
    assert ended.returncode == 2 and "new is done: nothing is left to resume" in ended.stderr
    assert f"source_checkpoint={run.path}/checkpoints/rl/latest" in ended.stderr  # red with <stage>


def test_runs_that_cannot_be_resumed_here(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: a run without a record, one from another machine, one that was never launched: one message each. Red with
    the mirror's config taken."""
    unknown = laptop.deploy("resume", "nowhere")
    assert unknown.returncode == 2 and "there is no run 'nowhere'" in unknown.stderr
    stopped(laptop, tmp_path)
    several = laptop.deploy("resume", "old", "--set", "sft.matrix_lr=1e-6,3e-6")
    assert (
        several.returncode == 2 and "starts one run, and --set asks for several" in several.stderr
    )
    file = laptop.rollouts_home / "registry" / "old.json"
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({**entry, "adopted": True}))
    adopted = laptop.deploy("resume", "old")
    assert adopted.returncode == 2 and "this one has no record of its config" in adopted.stderr
    file.write_text(json.dumps(entry))
    shutil.rmtree(laptop.rollouts_home / "runs" / "old")  # gone from its host: what is here counts
    done = laptop.deploy("resume", "old", "--run-id", "new")
    assert done.returncode == 0, done.stdout + done.stderr
