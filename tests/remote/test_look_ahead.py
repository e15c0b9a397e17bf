"""The plan looks further: ports of other runs, prompts, learning rates, sizes in a researcher's words."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.remote.errors import Problem
from rollouts.remote.host.host_probe import run_row
from rollouts.remote.inputs import NO_INPUTS, Inputs
from rollouts.remote.inputs.data_files import RowCount, count_rows
from rollouts.remote.inputs.paths import SentFiles
from rollouts.remote.texts import plan_text
from rollouts.run_dir import RunDir, Status, hold_lock, write_json_atomic
from tests.example_config import example_config, sglang
from tests.remote.hosts import Laptop, git, write_config
from tests.remote.test_plan import LOCK, RUN_ROW, plan_for


def inputs(**changes: Any) -> dict[str, Inputs]:
    return {"inputs": dataclasses.replace(NO_INPUTS, **changes)}


def rows(sft: int | None, rl: int | None, how: str = "counted") -> dict[str, Any]:
    counts = {"sft_mixture": sft, "rl_mixture": rl, "eval_mixture": 8}
    return inputs(rows={name: (RowCount(name, count, how),) for name, count in counts.items()})  # type: ignore[arg-type]


KEEP = "rollouts.training.filters.check_reward_nonzero_std"
PROBLEMS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "a port of a live run",
        {
            "facts": {
                "runs": (
                    {**RUN_ROW, "experiment_name": "other", "live": True, "ports": [30179, 30180]},
                )
            }
        },
        ["will use port 30180.", "engine.sglang_port"],
    ),
    (
        "a port that a live run listens on",
        {
            "facts": {
                "ports_in_use": (30180,),
                "runs": ({**RUN_ROW, "experiment_name": "other", "live": True, "ports": [30180]},),
            }
        },
        ["port 30180 is in use", f"the live run {RUN_ROW['run_id']} has it"],
    ),
    (
        "a router's port of a live run",
        {
            "engine": sglang(router_port=31000, replicas=2, gpu_ranks=[0, 1]),
            "code": {"engine_requirements": LOCK},
            "facts": {
                "runs": ({**RUN_ROW, "experiment_name": "other", "live": True, "ports": [31000]},)
            },
        },
        ["will use port 31000."],
    ),
    (
        "fewer prompts than a step takes",
        {"code": rows(8, 3)},
        ["rl.examples_per_step=4", "3 prompts", "to 3 or less"],
    ),
    (
        "at most so many prompts",
        {"code": rows(8, 2, "at most")},
        ["rl.examples_per_step=4", "at most 2 prompts"],
    ),
    (
        "fewer prompts than a step takes, some of them filtered out",
        {
            "code": rows(8, 3),
            "rl__sampling__over_sampling_factor": 2.0,
            "rl__sampling__filter_fn": KEEP,
        },
        ["rl.examples_per_step=4", "3 prompts"],
    ),
    (
        "no prompt at all",
        {"code": rows(8, 0)},
        ["data.rl_mixture: no row of", "start=0", "put rows into it"],
    ),
    (
        "no row to train on",
        {"code": rows(0, 8)},
        ["data.sft_mixture: no row of", "0 rows with start=0, stop=-1"],
    ),
    (
        "nothing held out is left",
        {"code": inputs(rows={"eval_mixture": (RowCount("eval", 0, "counted"),)})},
        ["data.eval_mixture: no row of"],
    ),
    (
        "nanochat's rate on random weights",
        {"sft__embedding_lr": 0.2},
        ["sft.embedding_lr=0.2", "Muon", "random"],
    ),
    (
        "a rate of a typing error",
        {"sft__matrix_lr": 30.0, "sft__init_lr_frac": 0.5},
        ["sft.matrix_lr=30.0", "15"],
    ),
    (
        "a name that is not sent",
        {"code": inputs(problems=(Problem("x is not sent"),))},
        ["x is not sent"],
    ),
    (
        "a line that no Python parses",
        {"code": inputs(syntax=(Problem("a.py:3: invalid"),))},
        ["a.py:3"],
    ),
    (
        "a link that leads out",
        {
            "code": {
                "named": {"mine.jsonl": "not sent"},
                **inputs(paths={"mine.jsonl": Problem("mine leads out")}),
            }
        },
        ["mine leads out"],
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"), [case[1:] for case in PROBLEMS], ids=[case[0] for case in PROBLEMS]
)
def test_each_problem_ahead(changes: dict[str, Any], expected: list[str]) -> None:
    """Goal: what would fail or spoil the run later is one problem now. Red with its check taken out."""
    problems = plan_for(**changes).problems
    assert len(problems) == 1, [problem.message for problem in problems]
    for part in expected:
        assert part in problems[0].text()


def test_what_is_not_a_problem_ahead() -> None:
    """Goal: nothing that may be right is refused: an ended run's port, a newer host's syntax, one prompt to overfit on,
    prompts begun more than once (over-sampling goes on into the next epoch), counts that are unknown, rates after a
    checkpoint, of pretrained weights or another stage. Red with any refused."""
    fine: list[dict[str, Any]] = [
        {
            "facts": {
                "runs": ({**RUN_ROW, "experiment_name": "other", "live": False, "ports": [30180]},)
            }
        },
        {"facts": {"runs": ({**RUN_ROW, "experiment_name": "other", "live": True},)}},
        {"facts": {"python_version": "3.99.0"}, "code": inputs(syntax=(Problem("a.py:3"),))},
        {"code": rows(8, 1)},
        {"code": rows(8, None, "unknown")},
        {"code": rows(8, 4)},
        {
            "code": rows(8, 4),
            "rl__sampling__over_sampling_factor": 4.0,
            "rl__sampling__filter_fn": KEEP,
        },
        {"rl__matrix_lr": 0.5},
        {"sft__embedding_lr": 0.2, "sft__init_lr_frac": 0.02},
        {
            "sft__embedding_lr": 0.2,
            "output__source_checkpoint": "/x",
            "facts": {"paths": {"/x": True}},
        },
    ]
    for changes in fine:
        assert plan_for(**changes).problems == (), changes
    (warning,) = plan_for(code=rows(8, 1)).warnings
    assert "there is one prompt" in warning


def test_warnings() -> None:
    """Goal: rates made for pretrained weights on random ones, and a lot of untracked data, are said. Red without."""
    low = {f"sft__{name}": 1e-6 for name in ("matrix_lr", "embedding_lr", "unembedding_lr")}
    assert "random ones hardly move" in plan_for(**low).warnings[0]
    assert "sft.matrix_lr=0.02 is high" in plan_for(sft__matrix_lr=0.02).warnings[0]
    (later,) = plan_for(rl__matrix_lr=5.0).warnings
    assert later.startswith("rl.matrix_lr=5 is very high for AdamW")
    many = {"untracked": ("a.bin", "b.bin", "c.bin", "d.bin"), "untracked_bytes": 1_200_000_000}
    plan = plan_for(code=many)
    assert (
        "4 files that git does not track would be sent, 1200 MB: a.bin, b.bin, c.bin, …"
        in plan.warnings[0]
    )
    assert not plan_for(code={**many, "untracked_bytes": 1_000_000}).warnings
    assert any("manifest.json has their digests" in note for note in plan.notes)
    assert plan_for().warnings == () and plan_for().problems == ()


def test_the_summary_in_a_researcher_s_words() -> None:
    """Goal: rows, steps, samples and tokens a step, parameters, memory and checkpoints, exact where they are known and
    said to be unknown where not. Red with steps of whole epochs alone (10 where 15 fit)."""
    known = {**rows(64, 100), **inputs(rows=rows(64, 100)["inputs"].rows, parameters=494_032_768)}
    plan = plan_for(
        code=known,
        rl__num_epochs=10,
        rl__examples_per_step=64,
        sft__num_iterations=-1,
        sft__num_epochs=3,
    )
    sft, rl, held_out, answers, model = plan.summary
    assert sft.startswith(
        "sft: 64 rows x 3 epochs, 16 a step (at most 1,024 tokens): about 12 steps"
    )
    assert (
        "rl: 100 prompts x 10 epochs, 64 prompts x 4 samples a step (at most 2,048 tokens): 15 steps"
        in rl
    )
    assert rl.endswith("3,840 samples; 40 prompts at the end do not fill a step")
    assert held_out == "held out: 8 rows"
    assert answers == (
        "sft answers in its own process, each time: all rows, an answer of at most 8 tokens to each, 64 in all; at "
        "most 256 answers and 131,072 tokens at once"
    )
    assert "494.0 M parameters, weights 2.0 GB" in model and "7.9 GB on each rank" in model
    assert model.endswith("a checkpoint takes 5.9 GB")
    assert all(line in plan_text(plan) for line in plan.summary)
    unknown = plan_for(code=rows(None, None, "unknown")).summary
    assert "prompts not counted" in unknown[1] and "parameters not counted" in unknown[4]
    replay = plan_for(
        output__mode="rl", rl__sampling__source="/r.jsonl", facts={"paths": {"/r.jsonl": True}}
    ).summary
    assert replay[0] == "rl: the steps recorded in /r.jsonl x 1"
    assert json.loads(json.dumps(plan.to_json()))["summary"] == list(plan.summary)


@pytest.mark.parametrize(
    "text", ['{"stages": 3}', "torn", '{"stages": [{"engines": [{"ready_url": "http://x:y/"}]}]}']
)
def test_a_live_run_tells_its_ports(text: str, tmp_path: Path) -> None:
    """Goal: a live run's engines' ports are known from its plan, and a damaged plan hides no run. Red without them."""
    run = RunDir(tmp_path / "r")
    write_json_atomic(run.status, a_status())
    engines = [
        {"ready_url": "http://127.0.0.1:30180/ready"},
        {"ready_url": "http://127.0.0.1:31000/readiness"},
    ]
    write_json_atomic(
        run.plan, {"stages": [{"engines": []}, {"engines": [*engines, {"ready_url": None}]}]}
    )
    lock = hold_lock(run)
    assert lock is not None
    with lock:
        row = run_row(run)
        assert row is not None and row["ports"] == [30180, 31000]
        run.plan.write_text(text)
        row = run_row(run)
        assert row is not None and row["ports"] == []


def a_status() -> Status:
    return Status(
        run_id="r",
        experiment_name="e",
        state="running",
        stage="sft",
        message="",
        started_at=0.0,
        updated_at=0.0,
        exit_code=None,
    )


def test_a_plan_of_a_real_repository(laptop: Laptop, make_host: Callable[..., Any]) -> None:
    """Goal: `deploy CONFIG --plan` shows sizes and warnings, and refuses names that would fail on the host; nothing is
    started. Red with the plan clean."""
    project = laptop.project
    (project / "local_rewards.py").write_text("def score(sample):\n    return 1.0\n")
    (project / ".git/info/exclude").write_text("local_rewards.py\n")
    (project.parent / "train.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (project / "configs/data/letters/train_rl.jsonl").unlink()
    (project / "configs/data/letters/train_rl.jsonl").symlink_to("../../../../train.jsonl")
    file = str(write_config(project, rl__reward__fn="local_rewards.score"))
    done = laptop.deploy(file, "--plan")
    assert done.returncode == 2 and done.stderr.count("error: ") == 2, done.stderr
    assert "train_rl.jsonl -> ../../../../train.jsonl" in done.stderr
    assert "'local_rewards.py' is here, but git ignores it" in done.stderr
    git(project, "checkout", "-q", "configs/data")
    (project / ".git/info/exclude").write_text("")
    plan = laptop.json(file, "--plan")
    assert any(line.startswith("sft: 1 row") for line in plan["summary"])
    assert any("there is one prompt" in warning for warning in plan["warnings"])
    done = laptop.deploy(file, "--run-id", "warned")
    assert done.returncode == 0 and "warning: rl.examples_per_step=4" in done.stdout, (
        done.stdout + done.stderr
    )


def test_rows_of_data_folders_are_counted_here(tmp_path: Path) -> None:
    """Goal: parquet's own count, as pyarrow wrote it, of the split that is named; a doubt stays unknown. Red: none was
    counted."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def write(name: str, count: int) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nested = [[{"role": "user", "content": "q" * n}] for n in range(count)]
        parquet.write_table(
            pyarrow.table({"id": range(count), "messages": nested, "b": [True] * count}),
            tmp_path / name,
        )

    for name, count in (
        ("train-00000-of-00002", 7),
        ("train-00001-of-00002", 300),
        ("test-00000-of-00001", 5),
    ):
        write(f"hub/data/{name}.parquet", count)
    write("doubt/train.parquet", 2)
    write("doubt/other.parquet", 2)
    write("torn/train.parquet", 2)
    whole = (tmp_path / "torn/train.parquet").read_bytes()
    (tmp_path / "torn/train.parquet").write_bytes(whole[:-9] + b"\xff" * 5 + b"PAR1")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/val.jsonl").write_text('{"question": "q"}\n\n{"question": "q"}\n')
    sent = SentFiles(
        tmp_path,
        [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()],
    )

    def count(name: str, split: str = "train", **changes: Any) -> RowCount:
        spec = dataclasses.replace(
            example_config().data.rl_mixture[0], name=name, split=split, subset=None, **changes
        )
        return count_rows(spec, sent)

    assert count("hub") == RowCount("hub", 307, "counted") and count("hub", "test").rows == 5
    assert (
        count("hub", max_samples=10, repeat=2).rows == 20 and count("lines", "validation").rows == 2
    )
    assert count("doubt").rows is count("torn").rows is count("hub", "validation").rows is None
