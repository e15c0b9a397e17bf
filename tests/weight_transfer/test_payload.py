"""Buckets in shared memory, and the message that says where one is."""

import base64
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from torch.multiprocessing import reductions

from rollouts.training.weight_transfer import payload
from rollouts.training.weight_transfer.payload import Entry, SharedMemoryError, dumps, loads, shared_buffer, views

CPU = torch.device("cpu")
ENTRIES = (Entry("a", (2, 3), torch.bfloat16), Entry("b.c", (4,), torch.bfloat16))


def files() -> set[str]:
    return {file.name for file in payload.SHARED_MEMORY.glob("rollouts-bucket-*")}


def test_another_process_reads_what_we_write() -> None:
    """Goal: the message gives names, shapes, dtypes and the current bytes to a process that has only the message, and
    that process leaves the file to us. Red with the header's bytes counted as data.
    """
    buffer = shared_buffer(1000, CPU)
    for _, view in views(buffer.flat, ENTRIES):
        view.copy_(torch.arange(view.numel()).view(view.shape))
    code = (
        "import sys; from rollouts.training.weight_transfer.payload import loads\n"
        "print([(name, str(tensor.dtype), tensor.tolist()) for name, tensor in loads(sys.stdin.read())])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=dumps(buffer, ENTRIES), capture_output=True, text=True, check=True
    )
    assert eval(done.stdout) == [
        ("a", "torch.bfloat16", [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        ("b.c", "torch.bfloat16", [0.0, 1.0, 2.0, 3.0]),
    ]
    assert buffer.is_there
    buffer.close()
    assert not buffer.is_there


def test_nothing_else_is_unpickled() -> None:
    """Goal: a message cannot run code, nor map a file elsewhere. Red with pickle's own find_class."""

    class Evil:
        def __reduce__(self):
            return os.system, ("exit 1",)

    with pytest.raises(ValueError, match="system is not admitted"):
        loads(base64.b64encode(pickle.dumps(Evil())).decode())
    with pytest.raises(ValueError, match="not a bucket of tensors"):
        loads("garbage")
    outside = payload._Call(reductions.rebuild_storage_filename, torch.UntypedStorage, b"", b"/../tmp/x", 10)
    with pytest.raises(ValueError, match="is not a file of /dev/shm"):
        loads(base64.b64encode(pickle.dumps({"flattened_tensor": outside, "metadata": []})).decode())


def test_no_room_is_told_before_a_byte_is_written() -> None:
    """Goal: shared memory that is too small is an error with a fix, not a SIGBUS at the first write past its end, and
    nothing stays behind. Red with ftruncate in place of posix_fallocate.
    """
    before = files()
    room = os.statvfs(payload.SHARED_MEMORY)
    with pytest.raises(SharedMemoryError, match=r"no room for a bucket of \d+ MiB .*weight_sync_bucket_mib"):
        shared_buffer(room.f_blocks * room.f_frsize + 2**30, CPU)
    assert files() == before


def test_what_a_killed_process_left_is_removed() -> None:
    """Goal: a trainer that was killed costs no memory for longer than until the next one. Red without the removal;
    and a live one's file was taken along with the lock left out.
    """
    code = (
        "import torch; from rollouts.training.weight_transfer.payload import shared_buffer\n"
        "buffer = shared_buffer(100, torch.device('cpu')); print(buffer.file.name, flush=True); input()"
    )
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        shared_buffer(100, CPU).close()
        assert name in files(), "its maker lives"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while name in files():
            assert time.monotonic() < deadline
            shared_buffer(100, CPU).close()
