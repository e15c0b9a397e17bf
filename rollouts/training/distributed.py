"""The few collective operations the library needs. Without a process group each is a no-op for a world of one.

Collectives of one group must be called in the same order on every rank, from one thread at a time. Backends call
theirs on their worker thread; loops call these only while no backend work is in flight. What is written in the
background has a group of its own (`new_group`).
"""

import datetime
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rollouts.training.devices import DeviceError, describe_build, set_current

NCCL_TIMEOUT_S = 1200.0  # covers a checkpoint that rank 0 writes and a slow first compilation
T = TypeVar("T")
_BUCKET_ELEMENTS = 2**25  # all-reduced at once: 128 MiB of float32


def initialize(
    device_type: str,
    *,
    timeout_s: float = 1800.0,
    alone: bool = False,
    store_file: Path | None = None,
) -> torch.device:
    """Join the group that torchrun's environment variables describe, and return this rank's device.

    A world of one makes no group, unless `alone` says that it needs one (sharding does). `timeout_s` bounds every
    collective of the CPU, so it must exceed the longest that ranks wait for rank 0 (generating a batch, an
    evaluation); those of GPUs have minutes, see `group_arguments`. Ranks of one machine find each other in
    `store_file`, which must not exist before; without it in the store that the environment names: torchrun's own, or a
    socket of torch's that listens on every address.
    Raises DeviceError where torch sees no CUDA device for this rank.
    """
    device = local_device(device_type, int(os.environ.get("LOCAL_RANK", "0")))
    set_current(device)
    arguments = group_arguments(device, timeout_s)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if store_file is None:
            dist.init_process_group(**arguments)
        else:
            store = _file_store(store_file, arguments["timeout"])
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(**arguments, store=store, rank=rank, world_size=world)
    elif alone:
        dist.init_process_group(**arguments, store=dist.HashStore(), rank=0, world_size=1)
    else:
        return device
    if device.type == "cuda":  # the timeout above is gloo's too, where ranks wait for rank 0
        backend = dist.distributed_c10d._get_default_group()._get_backend(device)
        backend._set_default_timeout(datetime.timedelta(seconds=nccl_timeout_s(timeout_s)))
    return device


def local_device(device_type: str, local_rank: int) -> torch.device:
    """This rank's device. Raises DeviceError, which names driver and build, where torch does not see it."""
    if device_type != "cuda":
        return torch.device(device_type)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= seen:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise DeviceError(
            f"torch sees no CUDA device {local_rank} here: it sees {seen}. Found {describe_build()}, "
            f"CUDA_VISIBLE_DEVICES {chosen}. Install a driver and a build of torch that fit each other, check the "
            "device in nvidia-smi, or set target.device_type='cpu'"
        )
    return torch.device("cuda", local_rank)


def group_arguments(device: torch.device, timeout_s: float) -> dict[str, Any]:
    """Return what the default group is made with. Objects and floats travel over gloo, also beside GPUs.

    `device_id` has NCCL make its communicator now, on the right device, so that a fault shows at the start.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if device.type != "cuda":
        return {"backend": "gloo", "timeout": timeout}
    return {"backend": "cpu:gloo,cuda:nccl", "timeout": timeout, "device_id": device}


def nccl_timeout_s(timeout_s: float) -> float:
    """Return how long a collective of GPUs may take. Ranks enter these together, so that minutes say that one is
    gone."""
    return min(timeout_s, NCCL_TIMEOUT_S)


def _file_store(path: Path, timeout: datetime.timedelta) -> dist.FileStore:
    store = dist.FileStore(str(path), int(os.environ["WORLD_SIZE"]))
    store.set_timeout(timeout)
    return store


def new_group() -> dist.ProcessGroup | None:
    """Another group of all ranks over the CPU, for collectives of another thread; None for a world of one.

    Every rank calls it, in the same order as it makes other groups.
    """
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Ranks on this node, as torchrun says; all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_first_of_host() -> bool:
    """Return whether no rank of this host comes before this one."""
    return rank() % local_world_size() == 0


def barrier() -> None:
    """Returns once every rank has come here."""
    all_reduce_floats([0.0])  # over the CPU's group; dist.barrier would pick a device of its own


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's `value` on every rank. It must pickle; what other ranks pass is ignored. `group`: None for the world."""
    if world_size() == 1:
        return value
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def on_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return what `function` returns on rank 0, on every rank; an exception there is raised on every rank too.

    Every rank calls it, and rank 0 alone runs the function.
    """
    if world_size() == 1:
        return function()
    value: Any = None
    error: BaseException | None = None
    if rank() == 0:
        try:
            value = function()
        except BaseException as raised:  # the other ranks must not wait for what will not come
            error = raised
    value, copied = broadcast_object((value, _portable(error)), group)
    failure = error or copied  # rank 0 raises its own, with its traceback
    if failure is not None:
        raise failure
    return value


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's `value`, by rank, on every rank. `group`: of all ranks; None for the world's own."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def all_reduce_floats(values: Sequence[float]) -> list[float]:
    """Return the elementwise sum over ranks, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in place. Same shapes and order on every rank; one dtype and device.

    They travel in flat buckets: one collective for many small gradients.
    """
    if world_size() > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            _copy_back(flat, bucket)


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place. Same shapes and order on every rank; one dtype and device."""
    if world_size() > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, src=0)
            _copy_back(flat, bucket)


def _portable(error: BaseException | None) -> BaseException | None:
    """Return `error` as another process can raise it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as reason:  # an exception class may break pickling in any way
        return RuntimeError(f"rank 0: {type(error).__name__}: {error} (shown as text: {reason})")
    return error


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def _copy_back(flat: Tensor, bucket: list[Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
