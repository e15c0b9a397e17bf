"""Share a bucket of tensors with another process: one flat buffer, and the message that says where it is.

The message is what SGLang reads in /update_weights_from_tensor with load_format "flattened_bucket": base64 of a pickle
of {"flattened_tensor": uint8 [bytes], "metadata": [one record a tensor]}. It holds no data, only where the data is: a
file in /dev/shm, laid out as torch's file_system sharing has it, or a CUDA IPC handle. The records are SimpleNamespace,
which SGLang's unpickler admits: the sender needs no sglang package. (`FlattenedTensorBucket` in sglang/srt/weight_sync/
tensor_bucket.py, `SafeUnpickler` in sglang/srt/utils/common.py.)

A reader keeps a file mapped until its name is gone. Mapping it for each message takes a third of the copy's time, since
the kernel enters every page again. The bytes are the sender's own, so a reader never sees those of an earlier message.

The file is ours, not torch's. torch would start a torch_shm_manager beside the sender, which holds the sender's output
open as long as a receiver lives. Its file is not reserved: if memory is short, writing to it is a SIGBUS.
"""

import base64
import fcntl
import functools
import io
import mmap
import os
import pickle
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

SHARED_MEMORY = Path("/dev/shm")
_FILE_PREFIX = "rollouts-bucket-"
_HEADER_BYTES = 64  # of torch's RefcountedMapAllocator: a 32-bit count of users, then padding
# counted down by each message that is read; never to 0, at which a reader would remove the file
_USERS = 2**30
_CUDA_DEVICE = 6  # which argument of `rebuild_cuda_tensor` is the device
_DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
_ADMITTED = {  # all that a message may name: functions of torch that rebuild a tensor, and plain records
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
    *(("torch", name) for name in _DTYPES),
    ("torch", "Tensor"),
    *(("torch.storage", name) for name in ("TypedStorage", "UntypedStorage")),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
}

# what this process reads, by file and bytes
_mapped: dict[tuple[str, int], torch.UntypedStorage] = {}


class SharedMemoryError(Exception):
    """There is no room for a bucket in shared memory. The message names the ways out."""


@dataclass(frozen=True)
class WireTensor:
    """One tensor of a model on its way: its name in a checkpoint, and its shape and dtype at the engine."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Buffer:
    """uint8 [bytes] that another process on this host can map. `file` is in /dev/shm; None on a GPU."""

    flat: Tensor
    file: Path | None
    lock: int | None = None  # a descriptor of the file, which holds its lock while we live

    @property
    def is_there(self) -> bool:
        """Return whether it can still be mapped: an engine that dies may remove the file's name."""
        return self.file is None or self.file.exists()

    def close(self) -> None:
        """Remove the name. The memory is freed with the last mapping."""
        if self.file is not None and self.lock is not None:
            self.file.unlink(missing_ok=True)
            os.close(self.lock)


def shared_buffer(nbytes: int, device: torch.device, *, owner: str = "") -> Buffer:
    """Return reserved memory, kept until closed. Raises SharedMemoryError if there is too little. `owner`: in its name.

    It first removes files whose makers were killed.
    """
    if device.type == "cuda":
        return Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device), None)
    _remove_orphans()
    file = SHARED_MEMORY / f"{_FILE_PREFIX}{owner}{uuid.uuid4().hex}"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.posix_fallocate(descriptor, 0, _HEADER_BYTES + nbytes)
        mapping = mmap.mmap(descriptor, _HEADER_BYTES + nbytes)
    except OSError as error:
        file.unlink()
        os.close(descriptor)
        raise SharedMemoryError(
            f"{SHARED_MEMORY} has no room for a bucket of {nbytes / 2**20:.0f} MiB ({error.strerror}): lower "
            "engine.weight_sync.bucket_mib, give the container more (docker run --shm-size), or set "
            "engine.weight_sync=DiskSync(...)"
        ) from error
    mapping[:4] = struct.pack("i", _USERS)
    return Buffer(
        torch.frombuffer(mapping, dtype=torch.uint8, offset=_HEADER_BYTES), file, descriptor
    )


def _remove_orphans() -> None:
    """Remove unlocked files: their makers are dead, since the kernel releases locks however a process dies."""
    for file in SHARED_MEMORY.glob(f"{_FILE_PREFIX}*"):
        try:
            descriptor = os.open(file, os.O_RDWR)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def views(flat: Tensor, entries: Sequence[WireTensor]) -> list[tuple[WireTensor, Tensor]]:
    """Return each entry's own part of `flat`, one after the other in order, in its shape and dtype.

    Entries of one bucket have one dtype, so that every part is aligned.
    """
    found, start = [], 0
    for entry in entries:
        end = start + entry.nbytes
        found.append((entry, flat[start:end].view(entry.dtype).view(entry.shape)))
        start = end
    return found


def dumps(buffer: Buffer, entries: Sequence[WireTensor]) -> str:
    """Return the message for one receiver. It is valid while `buffer` lives. One process reads it, once."""
    metadata, start = [], 0
    for entry in entries:
        shape, end = torch.Size(entry.shape), start + entry.nbytes
        place = {"start_idx": start, "end_idx": end, "numel": entry.nbytes}
        metadata.append(SimpleNamespace(name=entry.name, shape=shape, dtype=entry.dtype, **place))
        start = end
    shared = (
        _cuda_handle(buffer.flat[:start]) if buffer.file is None else _file_handle(buffer, start)
    )
    pickled = pickle.dumps(
        {"flattened_tensor": shared, "metadata": metadata}, pickle.HIGHEST_PROTOCOL
    )
    return base64.b64encode(pickled).decode()


def loads(message: str) -> list[tuple[str, Tensor]]:
    """Return the named tensors of a message, in the sender's memory: copy them before the sender is answered.

    Raises ValueError for anything that `dumps` does not make: unpickling runs only the functions named here.
    """
    try:
        content = _Unpickler(io.BytesIO(base64.b64decode(message, validate=True))).load()
        flat, metadata = content["flattened_tensor"], content["metadata"]
        return [
            (m.name, flat[m.start_idx : m.end_idx].view(m.dtype).view(m.shape)) for m in metadata
        ]
    except Exception as error:  # a broken pickle may raise anything at all
        raise ValueError(f"not a bucket of tensors: {type(error).__name__}: {error}") from error


class _Call:
    """Pickled, it is a call: unpickling it calls the function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def _file_handle(buffer: Buffer, nbytes: int) -> _Call:
    """Return the first bytes of a shared file as torch.multiprocessing rebuilds a tensor, without a manager process."""
    assert buffer.file is not None
    handle = f"/{buffer.file.name}".encode()
    untyped = _Call(
        reductions.rebuild_storage_filename, torch.UntypedStorage, b"", handle, buffer.flat.numel()
    )
    storage = _Call(reductions.rebuild_typed_storage, untyped, torch.uint8)
    return _Call(reductions.rebuild_tensor, Tensor, storage, (0, torch.Size([nbytes]), (1,), False))


def _cuda_handle(flat: Tensor) -> _Call:
    """Return a CUDA tensor as torch.multiprocessing rebuilds it, its device by UUID: numbers differ by process.

    SGLang takes either (`_rebuild_cuda_tensor_modified` in sglang/srt/utils/patch_torch.py).
    """
    rebuild, arguments = reductions.reduce_tensor(flat)
    uuid_ = str(torch.cuda.get_device_properties(arguments[_CUDA_DEVICE]).uuid)
    return _Call(rebuild, *arguments[:_CUDA_DEVICE], uuid_, *arguments[_CUDA_DEVICE + 1 :])


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise ValueError(f"{module}.{name} is not admitted")
        own = {
            "rebuild_cuda_tensor": _rebuild_cuda_tensor,
            "rebuild_storage_filename": _rebuild_storage,
        }
        return own.get(name) or super().find_class(module, name)


def _rebuild_storage(cls: Any, manager: bytes, handle: bytes, nbytes: int) -> torch.UntypedStorage:
    """Do as torch's function, without a manager process: the maker removes the file. Until then it is mapped once."""
    name = handle.decode().removeprefix("/")
    if "/" in name:
        raise ValueError(f"{name!r} is not a file of {SHARED_MEMORY}")
    for gone in [key for key in _mapped if not (SHARED_MEMORY / key[0]).exists()]:
        del _mapped[gone]
    if (name, nbytes) not in _mapped:
        with open(SHARED_MEMORY / name, "r+b") as file:
            mapping = mmap.mmap(file.fileno(), _HEADER_BYTES + nbytes)
        _mapped[name, nbytes] = torch.frombuffer(
            mapping, dtype=torch.uint8, offset=_HEADER_BYTES
        ).untyped_storage()
    return _mapped[name, nbytes]


def keep_mappings() -> None:
    """Have torch's unpickling in this process map our files as `loads` does. All else stays torch's.

    It is for engines that read messages by their own code: torch would map a file each time, drop it, and start a
    manager process for it.
    """
    theirs = reductions.rebuild_storage_filename

    @functools.wraps(theirs)  # pickled by its name where this process shares a tensor itself
    def rebuild(cls: Any, manager: bytes, handle: bytes, nbytes: int, dtype: Any = None) -> Any:
        ours = dtype is None and handle.decode().startswith(f"/{_FILE_PREFIX}")
        return (
            _rebuild_storage(cls, manager, handle, nbytes)
            if ours
            else theirs(cls, manager, handle, nbytes, dtype)
        )

    reductions.rebuild_storage_filename = rebuild


def _rebuild_cuda_tensor(*arguments: Any) -> Tensor:
    uuid_ = arguments[_CUDA_DEVICE]
    devices = range(torch.cuda.device_count())
    index = next(
        (i for i in devices if str(torch.cuda.get_device_properties(i).uuid) == uuid_), None
    )
    if index is None:
        raise ValueError(f"the sender's GPU {uuid_} is not visible here")
    placed = (*arguments[:_CUDA_DEVICE], index, *arguments[_CUDA_DEVICE + 1 :])
    return reductions.rebuild_cuda_tensor(*placed)
