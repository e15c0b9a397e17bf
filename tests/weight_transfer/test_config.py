"""What the config says about weight sync: what takes effect, and what is refused."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from base_config import Config
from rollouts.run_dir import RunDir
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weight_transfer.adapter import AdapterTransfer
from rollouts.training.weight_transfer.broadcast import BroadcastLink
from rollouts.training.weight_transfer.buckets import BucketTransfer
from rollouts.training.weight_transfer.disk import DiskTransfer
from rollouts.training.weight_transfer.tensor import SharedMemoryLink
from rollouts.worker.trainer_wiring import weight_sync, weight_transfer
from tests.example_config import example_config, replace_at
from tests.weight_transfer.sending import LORA, backend_over

SGLANG = {"engine.kind": "sglang", "engine.requirements_file": "requirements/sglang-cpu.txt"}
GPU = {**SGLANG, "target.device_type": "cuda", "target.gpu_ranks": [0], "engine.gpu_ranks": [0]}
GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}
APART = {**GPU, "engine.gpu_ranks": [1]}


ADAPTED = {"model.lora": LORA}
ADAPTERS = {**SGLANG, **ADAPTED, "engine.weight_sync": "lora"}


def config_with(changes: dict[str, Any]) -> Config:
    config = example_config()
    for path, value in {"engine.max_total_tokens": 4096 if "engine.kind" in changes else -1, **changes}.items():
        config = replace_at(config, path, value)
    return config


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"engine.weight_sync": "tensor"}, None),
        ({"engine.weight_sync": "broadcast"}, "engine.weight_sync='broadcast': needs 'disk' or 'tensor'"),
        ({"engine.weights_on_tmpfs": True}, None),
        (
            {"engine.weight_sync": "tensor", "engine.weights_on_tmpfs": True},
            "engine.weights_on_tmpfs=True: needs False",
        ),
        ({"engine.sleep_while_training": True}, "only engine.kind='sglang' gives its memory back"),
        ({**SGLANG, "engine.weight_sync": "broadcast"}, None),
        ({**SGLANG, "engine.sleep_while_training": True}, "there is no GPU to share"),
        ({**GPU, "engine.sleep_while_training": True}, None),
        (
            {**GPU, "engine.sleep_while_training": True, "rl.policy_lag_steps_max": 1},
            "engine.sleep_while_training=True",
        ),
        ({**APART, "engine.sleep_while_training": True}, "where a GPU is shared"),
        ({**GPU, "engine.weight_sync": "tensor"}, None),
        ({**GPU, "engine.weight_sync": "tensor", "engine.replicas": 2, "engine.gpu_ranks": [0, 1]}, "only one replica"),
        ({**GPU, "engine.replicas": 2, "engine.gpu_ranks": [0, 1]}, None),
        ({**GPU, "engine.weight_sync": "tensor", "host.env": GROWING}, "host.env['PYTORCH_CUDA_ALLOC_CONF']="),
        (
            {**GPU, "engine.weight_sync": "tensor", "host.env": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}},
            None,
        ),
        ({**GPU, "host.env": GROWING}, None),
        ({**GPU, "engine.weight_sync": "broadcast"}, "NCCL wants a GPU of its own for each side"),
        ({**APART, "engine.weight_sync": "broadcast"}, None),
        ({**APART, "engine.weight_sync": "tensor"}, "CUDA memory is shared on one GPU"),
        ({"engine.weight_sync": "tensor", "engine.restarts_max": 1, "rl.policy_lag_steps_max": 1}, None),
        ({"engine.weight_sync": "lora", **ADAPTED}, "engine.weight_sync='lora': needs 'disk' or 'tensor'"),
        ({**ADAPTERS, "engine.weights_on_tmpfs": True, "engine.restarts_max": 1, "rl.policy_lag_steps_max": 1}, None),
        ({**ADAPTERS, "model.lora": None}, "engine.weight_sync='lora': needs 'disk', 'tensor' or 'broadcast' with"),
        ({**ADAPTERS, **APART}, None),
        (
            {**ADAPTERS, "engine.replicas": 2, "engine.gpu_ranks": [0, 1], "engine.router_port": 31000},
            "engine.router_port=31000: needs None with engine.weight_sync='lora'",
        ),
        (
            {**ADAPTERS, **GPU, "engine.sleep_while_training": True},
            "sleep_while_training=True: needs False with engine",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], refused: str | None) -> None:
    """Goal: each setting that cannot work is refused with the reason, and its neighbours are not. Red with the checks
    of kinds, tmpfs, shared GPUs and NCCL left out.
    """
    found = [problem for problem in config_with(changes).problems() if "weight" in problem or "sleep" in problem]
    if refused is None:
        assert found == []
    else:
        assert len(found) == 1 and refused in found[0]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"rl.policy_lag_steps_max": 1, "rl.in_flight_updates": True}, "rl.in_flight_updates=True: needs False with"),
        ({"model.lora.target_modules": ["q_proj", "c_attn"]}, "model.lora.target_modules=['c_attn']: needs names that"),
        ({"model.lora.target_modules": ["layers.0.mlp.up_proj"]}, None),
    ],
)
def test_what_else_adapters_alone_refuse(changes: dict[str, Any], refused: str | None) -> None:
    """Goal: what would sample with an older adapter than it says, and layers that SGLang cannot adapt, are refused.
    Red with each of the two checks left out.
    """
    found = [p for p in config_with({**ADAPTERS, **changes}).problems() if "in_flight" in p or "target_modules" in p]
    assert found == [] if refused is None else len(found) == 1 and refused in found[0]


def test_each_kind_is_wired(models: dict[str, Path], tmp_path: Path) -> None:
    """Goal: kind, bucket size, place and dtype come from the config. Red with a bucket size of its own, and
    with buckets that do not name the run."""
    run, backend = RunDir(tmp_path / "some-run"), backend_over(models["old"], tmp_path)
    disk = weight_transfer(config_with({}), run, backend)
    assert isinstance(disk, DiskTransfer) and disk.directory == run.weights and not disk._temporary
    memory = weight_transfer(config_with({"engine.weights_on_tmpfs": True, "model.dtype": "bfloat16"}), run, backend)
    assert isinstance(memory, DiskTransfer) and memory._temporary
    assert str(memory.directory) == str(run.weights_in_memory)
    assert memory._options == {"dtype": torch.bfloat16}
    lora = weight_transfer(config_with({**ADAPTERS, "engine.weights_on_tmpfs": True}), run, backend)
    assert isinstance(lora, AdapterTransfer) and lora._temporary and lora._directory == run.weights_in_memory
    sized = {"engine.weight_sync_bucket_mib": 7, "engine.tensor_parallel_size": 2}
    tensor = weight_transfer(config_with({"engine.weight_sync": "tensor", **sized}), run, backend)
    assert isinstance(tensor, BucketTransfer) and tensor._bucket_bytes == 7 * 2**20 and tensor._dtype is None
    assert isinstance(tensor._link, SharedMemoryLink) and tensor._link._readers == 2
    buffer = tensor._link.buffer(8, torch.device("cpu"))
    assert run.buckets_in_memory() == [buffer.file]
    buffer.close()
    limits = {"limits.sample_timeout_s": 12.0}
    broadcast = weight_transfer(config_with({**SGLANG, "engine.weight_sync": "broadcast", **limits}), run, backend)
    assert isinstance(broadcast, BucketTransfer) and isinstance(broadcast._link, BroadcastLink)
    assert (broadcast._link._backend, broadcast._link._timeout_s) == ("gloo", 12.0)


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({}, False),
        ({"target.sharding": "full_shard"}, True),
        ({"rl.policy_lag_steps_max": 1}, True),
        ({"rl.sync_every": 2}, True),
        ({"rl.policy_lag_steps_max": 1, "engine.restarts_max": 0}, False),
    ],
)
def test_what_was_sent_is_kept_where_it_may_be_needed(
    changes: dict[str, Any], keep: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """Goal: a copy in the host's memory where an engine may start again and the model does not have it. Red without."""
    config = config_with({"engine.weight_sync": "tensor", "engine.restarts_max": 1, **changes})
    transfer = weight_transfer(config, RunDir(tmp_path / "run"), backend_over(models["old"], tmp_path))
    assert isinstance(transfer, BucketTransfer) and transfer._keep == keep


def test_weights_in_memory_go_even_after_a_failure(embedded_url: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Goal: the directory in /dev/shm is there during the run and gone after it, also when it ended in an error. Red
    with the removal after the `yield` instead of in its `finally`.
    """
    run, backend = RunDir(tmp_path / "failing-run"), backend_over(models["new"], tmp_path)
    config = config_with({"engine.weights_on_tmpfs": True})

    async def fail() -> None:
        async with SGLangEngine(embedded_url) as engine, weight_sync(config, run, backend, [engine]) as sync:
            assert sync is not None
            await sync(1)
            assert [path.name for path in run.weights_in_memory.glob("version_*")] == ["version_000001"]
            await sync(2)
            assert [path.name for path in run.weights_in_memory.glob("version_*")] == ["version_000002"]
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        anyio.run(fail)
    assert not run.weights_in_memory.exists()
