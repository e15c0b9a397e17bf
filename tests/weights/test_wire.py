"""Buckets in shared memory, and the message that says where one is."""

import base64
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

from rollouts.training.weights import wire
from rollouts.training.weights.wire import (
    SharedMemoryError,
    WireTensor,
    dumps,
    loads,
    shared_buffer,
    views,
)

CPU = torch.device("cpu")
ENTRIES = (WireTensor("a", (2, 3), torch.bfloat16), WireTensor("b.c", (4,), torch.bfloat16))


def files() -> set[str]:
    return {file.name for file in wire.SHARED_MEMORY.glob("rollouts-bucket-*")}


def test_another_process_reads_what_we_write() -> None:
    """Goal: the message gives names, shapes, dtypes and the current bytes to a process that has only the message, and
    that process leaves the file to us. Red with the header's bytes counted as data.
    """
    buffer = shared_buffer(1000, CPU)
    for _, view in views(buffer.flat, ENTRIES):
        view.copy_(torch.arange(view.numel()).view(view.shape))
    code = (
        "import sys; from rollouts.training.weights.wire import loads\n"
        "print([(name, str(tensor.dtype), tensor.tolist()) for name, tensor in loads(sys.stdin.read())])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=dumps(buffer, ENTRIES),
        capture_output=True,
        text=True,
        check=True,
    )
    assert eval(done.stdout) == [
        ("a", "torch.bfloat16", [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        ("b.c", "torch.bfloat16", [0.0, 1.0, 2.0, 3.0]),
    ]
    assert buffer.is_there
    buffer.close()
    assert not buffer.is_there


def mapped_files(pid: int | str = "self") -> set[str]:
    """Buckets that a process has mapped, removed ones too; none of one that is gone, or not ours to look into."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split("/dev/shm/")[1] for line in lines if "/dev/shm/rollouts-bucket-" in line}


def test_a_reader_keeps_its_mapping() -> None:
    """Goal: a file that is read again is not mapped again, and shows what is in it now; one that its maker removed is
    let go at the next message, and a message that still names it is refused. Red without `_mapped`, and with removed
    files left in it.
    """
    first, second = shared_buffer(1000, CPU), shared_buffer(1000, CPU)
    first.flat.fill_(0)
    before = loads(dumps(first, ENTRIES))[0][1]
    assert before.float().sum() == 0
    views(first.flat, ENTRIES)[0][1].fill_(2.0)
    again = loads(dumps(first, ENTRIES))[0][1]
    assert again.data_ptr() == before.data_ptr() and again.tolist() == [[2.0] * 3] * 2
    message = dumps(first, ENTRIES)
    name = first.file.name  # type: ignore[union-attr]
    first.close()
    del before, again, first
    loads(dumps(second, ENTRIES))
    assert f"{name} (deleted)" not in mapped_files()
    with pytest.raises(ValueError, match=f"No such file.*{name}"):
        loads(message)
    second.close()


def test_an_engines_own_unpickling_keeps_it_too() -> None:
    """Goal: after `keep_mappings` a message read by pickle, as SGLang reads it, is mapped once and takes no manager
    process; the engine's own sharing of tensors goes on. Red without `keep_mappings`, and with its function unnamed.
    """
    code = (
        "import base64, pickle, sys, torch, torch.multiprocessing as m\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "from rollouts.training.weights.wire import keep_mappings\n"
        "m.set_sharing_strategy('file_system')\n"
        "keep_mappings()\n"
        "kept = [pickle.loads(base64.b64decode(line))['flattened_tensor'].data_ptr() for line in sys.stdin]\n"
        "children = open('/proc/self/task/%d/children' % __import__('os').getpid()).read().split()\n"
        "print(len(kept), len(set(kept)), children)\n"
        "print(pickle.loads(ForkingPickler.dumps(torch.arange(3))).tolist())"
    )
    buffer = shared_buffer(1000, CPU)
    lines = "\n".join(dumps(buffer, ENTRIES) for _ in range(2))
    done = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["2 1 []", "[0, 1, 2]"]
    assert buffer.is_there
    buffer.close()


def test_nothing_else_is_unpickled() -> None:
    """Goal: a message cannot run code, nor map a file elsewhere. Red with pickle's own find_class."""

    class Evil:
        def __reduce__(self):
            return os.system, ("exit 1",)

    with pytest.raises(ValueError, match="system is not admitted"):
        loads(base64.b64encode(pickle.dumps(Evil())).decode())
    with pytest.raises(ValueError, match="not a bucket of tensors"):
        loads("garbage")
    outside = wire._Call(
        reductions.rebuild_storage_filename, torch.UntypedStorage, b"", b"/../tmp/x", 10
    )
    with pytest.raises(ValueError, match="is not a file of /dev/shm"):
        loads(
            base64.b64encode(pickle.dumps({"flattened_tensor": outside, "metadata": []})).decode()
        )


def test_no_room_is_told_before_a_byte_is_written() -> None:
    """Goal: shared memory that is too small is an error with a fix, not a SIGBUS at the first write past its end, and
    nothing stays behind. Red with ftruncate in place of posix_fallocate.
    """
    before = files()
    room = os.statvfs(wire.SHARED_MEMORY)
    with pytest.raises(
        SharedMemoryError, match=r"no room for a bucket of \d+ MiB .*weight_sync\.bucket_mib"
    ):
        shared_buffer(room.f_blocks * room.f_frsize + 2**30, CPU)
    assert files() == before


def test_what_a_killed_process_left_is_removed() -> None:
    """Goal: a trainer that was killed costs no memory for longer than until the next one. Red without the removal;
    and a live one's file was taken along with the lock left out.
    """
    code = (
        "import torch; from rollouts.training.weights.wire import shared_buffer\n"
        "buffer = shared_buffer(100, torch.device('cpu')); print(buffer.file.name, flush=True); input()"
    )
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        shared_buffer(100, CPU).close()
        assert name in files(), "its maker lives"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 200
        while name in files():
            assert time.monotonic() < deadline
            shared_buffer(100, CPU).close()
