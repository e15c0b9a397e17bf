"""Build what publishes the trainer's weights to the engines."""

import contextlib
from collections.abc import AsyncIterator, Sequence

import anyio
import torch

from rollouts.config import BroadcastSync, Config, DiskSync, LoraSync, TensorSync
from rollouts.engines.keys import read_keys
from rollouts.run_dir import RunDir
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.weights.channel import Channel
from rollouts.training.weights.channel.process_group import ProcessGroupChannel
from rollouts.training.weights.channel.shared_memory import SharedMemoryChannel
from rollouts.training.weights.deliver import Delivery
from rollouts.training.weights.deliver.adapter import AdapterDelivery
from rollouts.training.weights.deliver.buckets import BucketDelivery
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.deliver.far_copies import FarCopies
from rollouts.training.weights.publish import WeightPublisher


@contextlib.asynccontextmanager
async def open_publisher(
    config: Config,
    run: RunDir,
    backend: PyTorchTrainingBackend,
    pool: EnginePool,
    receivers: Sequence[str] = (),
) -> AsyncIterator[WeightPublisher | None]:
    """Yield the publisher; None if nothing samples. Its files are removed at the end."""
    if not config.uses_engine or config.engine is None:
        yield None
        return
    delivery = build_delivery(config, run, backend, receivers)
    sleeps = config.engine.sleep_while_training
    publisher = WeightPublisher(
        backend, pool, delivery, dtype=config.model.dtype, sleep_while_training=sleeps
    )
    try:
        yield publisher
    finally:
        with anyio.CancelScope(shield=True):
            await publisher.aclose()


def build_delivery(
    config: Config, run: RunDir, backend: PyTorchTrainingBackend, receivers: Sequence[str] = ()
) -> Delivery:
    """Return the delivery that engine.weight_sync names. Weights travel in the engines' dtype.

    `receivers`: URLs of what takes them on other hosts that have engines.
    """
    engine, rl = config.engine, config.rl
    assert engine is not None and rl is not None, (
        "weights are published to the engines of an rl stage"
    )
    dtype = None if config.model.dtype == "float32" else torch.bfloat16
    settings = engine.weight_sync
    if isinstance(settings, DiskSync | LoraSync):
        directory = run.weights_in_memory if settings.on_tmpfs else run.weights
        temporary = settings.on_tmpfs
        if isinstance(settings, LoraSync):
            return AdapterDelivery(backend, directory, dtype=dtype, temporary=temporary)
        others = FarCopies(receivers, key=read_keys()[1]) if receivers else None
        return DiskDelivery(backend, directory, dtype=dtype, temporary=temporary, far=others)
    channel = _channel(config, run, settings, engine.tensor_parallel_size)
    steps_meanwhile = rl.policy_lag_steps_max > 0 or rl.sampling.sync_every != 1
    keep = engine.restarts_max > 0 and (steps_meanwhile or config.target.sharding != "none")
    return BucketDelivery(
        backend, channel, dtype=dtype, bucket_bytes=settings.bucket_mib * 2**20, keep=keep
    )


def _channel(
    config: Config, run: RunDir, settings: TensorSync | BroadcastSync, readers: int
) -> Channel:
    if isinstance(settings, BroadcastSync):
        timeout_s = config.limits.sample_timeout_s
        device_type = config.target.device_type
        return ProcessGroupChannel(
            device_type=device_type, tensor_parallel_size=readers, timeout_s=timeout_s
        )
    return SharedMemoryChannel(tensor_parallel_size=readers, owner=f"{run.memory_name}-")
