"""Data-parallel training: two gloo ranks under a real torchrun give what one rank gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rollouts.training import distributed
from tests.training import two_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The directory and both ranks' results of one torchrun."""
    directory = tmp_path_factory.mktemp("two_ranks")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*torchrun, "-m", "tests.training.two_ranks", str(directory)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory, [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict]:
    """The same work in this process, a world of one."""
    directory = tmp_path_factory.mktemp("one_rank")
    two_ranks.main(directory)
    return directory, json.loads((directory / "rank_0.json").read_text())


TIMES = (
    "tokens_per_s",
    "step_s",
    "generate_s",
    "train_s",
    "sync_s",
    "data_s",
    "peak_memory_gib",
    "age_s_mean",
    "age_s_max",
)


@pytest.mark.parametrize("stage", ["sft", "rl", "policy", "value", "ahead"])
def test_two_ranks_train_as_one(two, one, stage):
    """Goal: loss, gradient norm and every other metric agree to 1e-6 relative, also after a resume.

    "policy" is a loss with all its parts, "value" PPO with a value head, "ahead" generates a step ahead.
    Red with gradients averaged over ranks, with both ranks on the same rows, with parameters not broadcast; "policy"
    alone with sequences_global left out of the prepared batch; "value" alone with the head's gradient, the moments of
    its advantages, or its first weights not shared by the ranks.
    """
    _, ranks = two
    _, alone = one
    assert len(alone[stage]) == (5 if stage == "sft" else 4)
    for rank in ranks:
        for found, expected in zip(rank[stage], alone[stage], strict=True):
            assert without_times(found) == pytest.approx(
                without_times(expected), rel=1e-6, abs=1e-7
            )
    assert [without_times(r) for r in ranks[0][stage]] == [
        without_times(r) for r in ranks[1][stage]
    ]


@pytest.mark.parametrize("stage", ["rl", "policy", "value", "ahead"])
def test_every_rank_s_log_probs_are_recorded(two, one, stage):
    """Goal: |trainer - sampler| of the samples has the mean that was logged, whichever rank trained on them. Red with
    the micro-batches' rows taken in the batch's order."""
    for directory, results in ((two[0], two[1][0]), one):
        lines = (directory / stage / "rollouts.jsonl").read_text().splitlines()
        rows = list(map(json.loads, lines))
        logged = {row["step"]: row["logp_diff_abs"] for row in results[stage]}
        assert logged == pytest.approx(mean_differences(rows), rel=1e-4)


def mean_differences(rows: list[dict]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for row in rows:
        mask = row["loss_mask"][-row["response_length"] :]
        pairs = zip(row["trainer_log_probs"], row["rollout_log_probs"], mask, strict=True)
        for trainer, sampler, trained in pairs:
            assert (trainer is not None) == (trained != 0)
            if trained:
                found.setdefault(row["step"], []).append(abs(trainer - sampler))
    return {step: sum(values) / len(values) for step, values in found.items()}


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_rank_0_writes_one_checkpoint_of_the_same_weights(two, one, stage):
    """Goal: one directory per step, whatever the ranks, and the same weights in it. Red with every rank writing."""
    directories = [directory / stage for directory, _ in (two, one)]
    weights = [load_file(directory / "latest" / "model.safetensors") for directory in directories]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max().item() < 1e-5, name
    listed = [sorted(path.name for path in directory.iterdir()) for directory in directories]
    assert listed[0] == listed[1]
    metadata = json.loads((directories[0] / "latest" / "metadata.json").read_text())
    assert metadata["world_size"] == 2


def test_collectives(two, one):
    """Goal: each helper does what it says over two ranks, and nothing over one; a failure on rank 0 is everyone's.

    Red with op=MAX in all_reduce, and with on_rank_0 raising before it broadcasts: rank 1 waits until the time-out.
    """
    _, ranks = two
    summed, copied = [[3.0] * 3, [[30.0, 30.0]] * 2], [0.0, 0.0]
    for rank, result in enumerate(ranks):
        *found, by_rank_0, failures = result["collectives"]
        assert found == [rank, 2, {"from": 0}, [0, 1], [2.0, 1.0], [*summed, copied]]
        assert by_rank_0 == ["by 0", "by 0"]
        assert failures[0] == "KeyError: 'k'"
        assert failures[1] == (
            "RuntimeError: rank 0: Unpicklable: u (shown as text: not this one)"
            if rank
            else "Unpicklable: u"
        )
    expected = [
        0,
        1,
        {"from": 0},
        [0],
        [1.0, 0.0],
        [[1.0] * 3, [[10.0, 10.0]] * 2, copied],
        ["by 0", "by 0"],
    ]
    assert one[1]["collectives"] == [*expected, ["KeyError: 'k'", "Unpicklable: u"]]


def test_buckets_keep_order_and_bounds(monkeypatch):
    """Goal: gradients are grouped in order, none lost, none above the bound but a single larger one.

    Red with the room not reset for a new bucket.
    """
    import torch

    monkeypatch.setattr(distributed, "_BUCKET_ELEMENTS", 5)
    tensors = [torch.zeros(n) for n in (2, 3, 1, 9, 4, 1)]
    buckets = distributed._buckets(tensors)
    assert [[tensor.numel() for tensor in bucket] for bucket in buckets] == [
        [2, 3],
        [1],
        [9],
        [4, 1],
    ]
    assert [id(t) for bucket in buckets for t in bucket] == [id(t) for t in tensors]


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in TIMES}
