"""How the trainer's weights reach the engines."""

import contextlib
from collections.abc import AsyncIterator, Sequence

import anyio
import torch

from rollouts.config import BroadcastSync, Config, DiskSync, LoraSync, TensorSync
from rollouts.run_dir import RunDir
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.resilient import ResilientEngine
from rollouts.training.weight_transfer.adapter import AdapterTransfer
from rollouts.training.weight_transfer.broadcast import BroadcastLink
from rollouts.training.weight_transfer.buckets import BucketTransfer
from rollouts.training.weight_transfer.disk import DiskTransfer
from rollouts.training.weight_transfer.protocol import Link, Transfer
from rollouts.training.weight_transfer.sync import WeightSync
from rollouts.training.weight_transfer.tensor import SharedMemoryLink


@contextlib.asynccontextmanager
async def open_weight_sync(
    config: Config, run: RunDir, backend: PyTorchTrainingBackend, engines: Sequence[ResilientEngine]
) -> AsyncIterator[WeightSync | None]:
    """Yield what publishes the trainer's weights; None where nothing samples. Its files are removed at the end."""
    if not config.uses_engine or config.engine is None:
        yield None
        return
    transfer = build_transfer(config, run, backend)
    sleeps = config.engine.sleep_while_training
    sync = WeightSync(backend, engines, transfer, dtype=config.model.dtype, sleep_while_training=sleeps)
    try:
        yield sync
    finally:
        with anyio.CancelScope(shield=True):
            await sync.aclose()


def build_transfer(config: Config, run: RunDir, backend: PyTorchTrainingBackend) -> Transfer:
    """Return the way that engine.weight_sync names. Weights travel in the engines' dtype."""
    engine, rl = config.engine, config.rl
    assert engine is not None and rl is not None, "weights are published to the engines of an rl stage"
    dtype = None if config.model.dtype == "float32" else torch.bfloat16
    settings = engine.weight_sync
    if isinstance(settings, DiskSync | LoraSync):
        directory = run.weights_in_memory if settings.on_tmpfs else run.weights
        kind = AdapterTransfer if isinstance(settings, LoraSync) else DiskTransfer
        return kind(backend, directory, dtype=dtype, temporary=settings.on_tmpfs)
    link = _link(config, run, settings, engine.tensor_parallel_size)
    steps_meanwhile = rl.policy_lag_steps_max > 0 or rl.sampling.sync_every != 1
    keep = engine.restarts_max > 0 and (steps_meanwhile or config.target.sharding != "none")
    return BucketTransfer(backend, link, dtype=dtype, bucket_bytes=settings.bucket_mib * 2**20, keep=keep)


def _link(config: Config, run: RunDir, settings: TensorSync | BroadcastSync, readers: int) -> Link:
    if isinstance(settings, BroadcastSync):
        timeout_s = config.limits.sample_timeout_s
        return BroadcastLink(device_type=config.target.device_type, tensor_parallel_size=readers, timeout_s=timeout_s)
    return SharedMemoryLink(tensor_parallel_size=readers, owner=f"{run.memory_name}-")
