"""What the config says about weight sync: what takes effect, and what is refused."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from base_config import BroadcastSync, Config, DiskSync, LoraSync, TensorSync
from rollouts.run_dir import RunDir
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weights.channel.process_group import ProcessGroupChannel
from rollouts.training.weights.channel.shared_memory import SharedMemoryChannel
from rollouts.training.weights.deliver.adapter import AdapterDelivery
from rollouts.training.weights.deliver.buckets import BucketDelivery
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.worker.builders.weights import build_delivery, open_publisher
from tests.example_config import ahead, example_config, replace_at, sglang
from tests.weights.deliveries import LORA, backend_over

DISK, ON_TMPFS = DiskSync(on_tmpfs=False), DiskSync(on_tmpfs=True)
TENSOR, BROADCAST, ADAPTER = (
    TensorSync(bucket_mib=256),
    BroadcastSync(bucket_mib=256),
    LoraSync(on_tmpfs=False),
)
GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}
GPU = {"target.device_type": "cuda", "target.gpu_ranks": [0]}
ADAPTED = {"model.lora": LORA}


def config_with(changes: dict[str, Any], **engine: Any) -> Config:
    """The example with `changes`; with fields of `engine`, SGLang with those in the place of its engine."""
    config = (
        replace_at(example_config(), "engine", sglang(**engine)) if engine else example_config()
    )
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config


def apart(**engine: Any) -> dict[str, Any]:
    return {"gpu_ranks": [1], **engine}


@pytest.mark.parametrize(
    ("changes", "engine", "refused"),
    [
        ({}, {}, None),
        ({"engine.weight_sync": TENSOR}, {}, None),
        (
            {"engine.weight_sync": BROADCAST},
            {},
            "(bucket_mib=256): needs one of DiskSync, TensorSync",
        ),
        ({"engine.weight_sync": ON_TMPFS}, {}, None),
        ({}, {"weight_sync": BROADCAST}, None),
        ({}, {"sleep_while_training": True}, "there is no GPU to share"),
        (GPU, {"sleep_while_training": True}, None),
        (
            {**GPU, "rl.ahead": ahead()},
            {"sleep_while_training": True},
            "engine.sleep_while_training=True",
        ),
        (GPU, apart(sleep_while_training=True), "where a GPU is shared"),
        (GPU, {"weight_sync": TENSOR}, None),
        (GPU, {"weight_sync": TENSOR, "replicas": 2, "gpu_ranks": [0, 1]}, "only one replica"),
        (GPU, {"weight_sync": DISK, "replicas": 2, "gpu_ranks": [0, 1]}, None),
        (
            {**GPU, "host.env": GROWING},
            {"weight_sync": TENSOR},
            "host.env['PYTORCH_CUDA_ALLOC_CONF']=",
        ),
        (
            {**GPU, "host.env": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}},
            {"weight_sync": TENSOR},
            None,
        ),
        ({**GPU, "host.env": GROWING}, {"weight_sync": DISK}, None),
        (GPU, {"weight_sync": BROADCAST}, "NCCL wants a separate GPU for each side"),
        (GPU, apart(weight_sync=BROADCAST), None),
        (GPU, apart(weight_sync=TENSOR), "CUDA memory is shared on one GPU"),
        ({"engine.weight_sync": TENSOR, "engine.restarts_max": 1, "rl.ahead": ahead()}, {}, None),
        (
            {"engine.weight_sync": ADAPTER, **ADAPTED},
            {},
            "(on_tmpfs=False): needs one of DiskSync, TensorSync",
        ),
        (
            {**ADAPTED, "rl.ahead": ahead()},
            {"weight_sync": LoraSync(on_tmpfs=True), "restarts_max": 1},
            None,
        ),
        (
            {},
            {"weight_sync": ADAPTER},
            "LoraSync(on_tmpfs=False): needs DiskSync, TensorSync or BroadcastSync with",
        ),
        ({**ADAPTED, **GPU}, apart(weight_sync=ADAPTER), None),
        (
            ADAPTED,
            {"weight_sync": ADAPTER, "replicas": 2, "gpu_ranks": [0, 1], "router_port": 31000},
            "engine.router_port=31000: needs None with engine.weight_sync=LoraSync",
        ),
        (
            {**ADAPTED, **GPU},
            {"weight_sync": ADAPTER, "sleep_while_training": True},
            "sleep_while_training=True: needs False with engine",
        ),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any], engine: dict[str, Any], refused: str | None
) -> None:
    """Goal: each setting that cannot work is refused with the reason, and its neighbours are not. Red with the checks
    of kinds, shared GPUs and NCCL left out.
    """
    problems = config_with(changes, **engine).problems()
    found = [problem for problem in problems if "weight" in problem or "sleep" in problem]
    if refused is None:
        assert found == []
    else:
        assert len(found) == 1 and refused in found[0]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            {"rl.ahead": ahead(in_flight_updates=True)},
            "rl.ahead.in_flight_updates=True: needs False with",
        ),
        (
            {"model.lora.target_modules": ["q_proj", "c_attn"]},
            "model.lora.target_modules=['c_attn']: needs names that",
        ),
        ({"model.lora.target_modules": ["layers.0.mlp.up_proj"]}, None),
    ],
)
def test_what_else_adapters_alone_refuse(changes: dict[str, Any], refused: str | None) -> None:
    """Goal: what would sample with an older adapter than it says, and layers that SGLang cannot adapt, are refused.
    Red with each of the two checks left out.
    """
    problems = config_with({**ADAPTED, **changes}, weight_sync=ADAPTER).problems()
    found = [
        problem for problem in problems if "in_flight" in problem or "target_modules" in problem
    ]
    assert found == [] if refused is None else len(found) == 1 and refused in found[0]


def test_each_kind_is_wired(models: dict[str, Path], tmp_path: Path) -> None:
    """Goal: kind, bucket size, place and dtype come from the config. Red with a bucket size of its own, and
    with buckets that do not name the run."""
    run, backend = RunDir(tmp_path / "some-run"), backend_over(models["old"], tmp_path)
    disk = build_delivery(config_with({}), run, backend)
    assert isinstance(disk, DiskDelivery) and disk.directory == run.weights and not disk._temporary
    memory = build_delivery(
        config_with({"engine.weight_sync": ON_TMPFS, "model.dtype": "bfloat16"}), run, backend
    )
    assert isinstance(memory, DiskDelivery) and memory._temporary
    assert str(memory.directory) == str(run.weights_in_memory)
    assert memory._dtype == torch.bfloat16
    lora = build_delivery(config_with(ADAPTED, weight_sync=LoraSync(on_tmpfs=True)), run, backend)
    assert (
        isinstance(lora, AdapterDelivery)
        and lora._temporary
        and lora._directory == run.weights_in_memory
    )
    two = config_with({}, weight_sync=TensorSync(bucket_mib=7), tensor_parallel_size=2)
    tensor = build_delivery(two, run, backend)
    assert isinstance(tensor, BucketDelivery)
    assert tensor._source._plan.keywords == {"dtype": None, "bucket_bytes": 7 * 2**20}
    assert isinstance(tensor._channel, SharedMemoryChannel) and tensor._channel._readers == 2
    buffer = tensor._channel.buffer(8, torch.device("cpu"))
    assert run.buckets_in_memory() == [buffer.file]
    buffer.close()
    limits = {"limits.sample_timeout_s": 12.0}
    broadcast = build_delivery(config_with(limits, weight_sync=BROADCAST), run, backend)
    assert isinstance(broadcast, BucketDelivery) and isinstance(
        broadcast._channel, ProcessGroupChannel
    )
    assert (broadcast._channel._backend, broadcast._channel._timeout_s) == ("gloo", 12.0)


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({}, False),
        ({"target.sharding": "full_shard"}, True),
        ({"rl.ahead": ahead()}, True),
        ({"rl.sampling.sync_every": 2}, True),
        ({"rl.ahead": ahead(), "engine.restarts_max": 0}, False),
    ],
)
def test_what_was_sent_is_kept_where_it_may_be_needed(
    changes: dict[str, Any], keep: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """Goal: a copy in the host's memory where an engine may start again and the model does not have it. Red without."""
    config = config_with({"engine.weight_sync": TENSOR, "engine.restarts_max": 1, **changes})
    delivery = build_delivery(
        config, RunDir(tmp_path / "run"), backend_over(models["old"], tmp_path)
    )
    assert isinstance(delivery, BucketDelivery) and delivery._source._keep == keep


def test_weights_in_memory_go_even_after_a_failure(
    embedded_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Goal: the directory in /dev/shm is there during the run and gone after it, also when it ended in an error. Red
    with the removal after the `yield` instead of in its `finally`.
    """
    run, backend = RunDir(tmp_path / "failing-run"), backend_over(models["new"], tmp_path)
    config = config_with({"engine.weight_sync.on_tmpfs": True})

    async def fail() -> None:
        pool = EnginePool.of([SGLangEngine(embedded_url)])
        async with pool, open_publisher(config, run, backend, pool) as publisher:
            assert publisher is not None
            await publisher.publish(1)
            assert [path.name for path in run.weights_in_memory.glob("version_*")] == [
                "version_000001"
            ]
            await publisher.publish(2)
            assert [path.name for path in run.weights_in_memory.glob("version_*")] == [
                "version_000002"
            ]
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        anyio.run(fail)
    assert not run.weights_in_memory.exists()
