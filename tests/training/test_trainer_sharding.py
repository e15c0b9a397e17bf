"""What target.sharding and output.checkpoints_keep do in a job: the trainer's entry on two gloo ranks; its wiring."""

from pathlib import Path

import anyio
import pytest
import torch

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from rollouts.training.backends import FSDPConfig, FSDPTrainingBackend, PyTorchTrainingBackend
from rollouts.training.checkpoint import Retention
from rollouts.worker.builders.backend import build_backend, build_retention
from tests.example_config import example_config, replace_at
from tests.training import tiny_task
from tests.training.process_nursery import shared

REPOSITORY = Path(__file__).resolve().parents[2]


def config_with(**changes):
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path.replace("__", "."), value)
    assert config.problems() == ()
    return config


def test_a_sharded_job(tmp_path):
    """Goal: the trainer trains, evaluates and saves over two ranks, and keeps the last and the best checkpoint.

    Red with generation on rank 0 alone (it waits for the other's shards), and with sharding left out: one .distcp file.
    """
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    config_with(
        target__gpu_ranks=[0, 1],
        target__sharding="full_shard",
        data__eval_mixture__0__max_samples=6,
        sft__num_iterations=3,
        sft__checkpoint_every=1,
        output__checkpoints_keep=1,
        output__checkpoint_best={"sft": "max loss"},
        output__mode="sft",
    ).save(run.config)
    shared().torchrun(
        2, "rollouts.worker.trainer", ["--run-dir", str(run.path), "--stage", "sft"], tmp_path
    )
    losses = {row["step"]: row["loss"] for row in read_jsonl(run.metrics)}
    assert sorted(losses, key=losses.__getitem__) == [3, 2, 1], (
        "the first is the best by 'max loss'"
    )
    events = [
        (row["kind"], row["path"][-1])
        for row in read_jsonl(run.events)
        if "checkpoint" in row["kind"]
    ]
    assert sorted(events) == [
        ("checkpoint", "1"),
        ("checkpoint", "2"),
        ("checkpoint", "3"),
        ("checkpoint_removed", "2"),
    ]
    standing = sorted(path.name for path in (run.checkpoints / "sft").iterdir())
    assert standing == ["latest", "step_000001", "step_000003"]
    latest = run.latest_checkpoint("sft")
    assert (
        manifest_problems(latest) == () and len(list((latest / "optimizer").glob("*.distcp"))) == 2
    )
    metrics = {row["metric"] for row in read_jsonl(run.eval) if row["stage"] == "sft"}
    assert {"validation_loss", "exact_match"} <= metrics


@pytest.fixture
def alone():
    """A world of one that ends with the test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"target__sharding": "full_shard"}, FSDPConfig("FULL_SHARD", mixed_precision=False)),
        ({"target__sharding": "shard_grad_op"}, FSDPConfig("SHARD_GRAD_OP", mixed_precision=False)),
        (
            {"target__sharding": "hybrid_shard", "target__shard_group_size": 1},
            FSDPConfig("HYBRID_SHARD", mixed_precision=False, shard_group_size=1),
        ),
        (
            {
                "target__sharding": "full_shard",
                "target__cpu_offload": True,
                "model__dtype": "bfloat16",
            },
            FSDPConfig("FULL_SHARD", mixed_precision=True, cpu_offload=True),
        ),
    ],
)
def test_the_config_decides_the_backend(tmp_path, alone, changes, expected):
    """Goal: each field reaches the backend, which then trains. Red with cpu_offload not handed on."""
    config = config_with(**{"target.sharding": "none", **changes})
    backend = build_backend(
        config,
        "sft",
        checkpoint_dir=tmp_path,
        model_path=config.model.name,
        tokenizer=tiny_task.tiny_tokenizer(),
        device=torch.device("cpu"),
        num_steps=1,
        reference=None,
        retention=Retention(),
    )
    assert isinstance(backend, FSDPTrainingBackend if expected else PyTorchTrainingBackend)
    assert getattr(backend._trained.placement, "config", None) == expected
    ids = torch.tensor([[3, 4, 5]])
    batch = {"input_ids": ids, "labels": ids, "loss_mask": torch.ones(1, 3)}

    async def main():
        return (await backend.forward_backward(batch).result()), (
            await backend.optim_step().result()
        )["step"]

    assert anyio.run(main)[1] == 1


def test_the_config_decides_what_stays(tmp_path):
    """Goal: the two output fields reach each stage's retention. Red with the other stage's best."""
    config = config_with(
        output__checkpoints_keep=3, output__checkpoint_best={"rl": "max reward_mean"}
    )
    run = RunDir(tmp_path)
    sft, rl = (build_retention(config, run, stage) for stage in ("sft", "rl"))
    assert (sft.keep_last, sft.best_metric) == (3, None)
    assert (rl.keep_last, rl.best_metric, rl.best_mode) == (3, "reward_mean", "max")
