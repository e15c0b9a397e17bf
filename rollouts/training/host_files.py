"""Files between the hosts of a job, which need not share a disk: over the ranks' own process group, in pieces.

`collect` brings what ranks of other hosts wrote to rank 0's host; `spread` gives every host what lies on rank 0's.
Where a host has a file already, on a shared disk or from before, nothing of it is sent.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rollouts.manifest import MANIFEST_FILE, manifest_problems
from rollouts.training import distributed

PIECE_BYTES = 2**25  # sent at once: what a rank holds in memory of a file


def collect(
    directory: Path, absent: Callable[[], Sequence[str]], group: dist.ProcessGroup | None
) -> None:
    """Bring files of `directory` that rank 0 lacks, `absent()` there, to rank 0 from a rank whose host has them.

    Every rank of `group` calls it. A file that was sent is removed where it came from. What no rank has stays absent.
    """
    if not _several_hosts():
        return
    names = distributed.on_rank_0(lambda: list(absent()), group)
    held = distributed.gather_objects(_sizes(directory, names), group)
    for name in names:
        source = next((rank for rank, files in enumerate(held) if name in files), None)
        if source is None:
            continue
        if distributed.rank() == source:
            for piece in _pieces(directory / name, held[source][name]):
                dist.send(piece, dst=0, group=group)
            (directory / name).unlink()
        elif distributed.rank() == 0:
            with (directory / name).open("wb") as stream:
                for size in _piece_sizes(held[source][name]):
                    piece = torch.empty(size, dtype=torch.uint8)
                    dist.recv(piece, src=source, group=group)
                    stream.write(piece.numpy().tobytes())
    if distributed.rank() != 0:
        for path in (directory, directory.parent):
            with contextlib.suppress(OSError):  # another rank's file is in it still, or it is gone
                path.rmdir()


def spread(directory: Path, copy: Path) -> Path:
    """Give every host the checkpoint that rank 0's host has in `directory`: as `copy`, unless its `directory` has it.

    Every rank calls it, with names of its own host, and gets the place once it is whole there. A directory without a
    manifest is no checkpoint: each host is to have its own.
    """
    manifest = distributed.broadcast_object(_manifest(directory)) if _several_hosts() else b""
    if not manifest:
        return directory
    states = distributed.gather_objects(_state(directory, copy, manifest))
    own = states[distributed.rank() - distributed.rank() % distributed.local_world_size()]
    if "lacking" in states:
        _send_all(directory, copy if own == "lacking" and distributed.is_first_of_host() else None)
    return directory if own == "there" else copy


def _state(directory: Path, copy: Path, manifest: bytes) -> str:
    """Return what this host has, for the ranks of it: the first of them looks."""
    if distributed.rank() < distributed.local_world_size():
        return "there"
    if not distributed.is_first_of_host():
        return "as the first says"
    if _is_whole(directory, manifest):
        return "there"
    return "copied" if _is_whole(copy, manifest) else "lacking"


def _send_all(directory: Path, copy: Path | None) -> None:
    """Send rank 0's directory to all; a rank with a `copy` writes it there. Raises OSError for a damaged one."""
    files = distributed.broadcast_object(_listing(directory) if distributed.rank() == 0 else {})
    partial = None if copy is None else copy.with_name(f".{copy.name}.part")
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    for name, size in files.items():
        _spread_file(directory / name, None if partial is None else partial / name, size)
    if copy is not None and partial is not None:
        if problems := manifest_problems(partial):
            raise OSError(f"{copy}: came damaged from the first host: {'; '.join(problems[:3])}")
        shutil.rmtree(copy, ignore_errors=True)
        os.replace(partial, copy)
    distributed.barrier()


def _spread_file(source: Path, copy: Path | None, size: int) -> None:
    pieces = _pieces(source, size) if distributed.rank() == 0 else map(_empty, _piece_sizes(size))
    with contextlib.ExitStack() as stack:
        stream = None
        if copy is not None:
            copy.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(copy.open("wb"))
        for piece in pieces:
            dist.broadcast(piece, src=0)
            if stream is not None:
                stream.write(piece.numpy().tobytes())


def _several_hosts() -> bool:
    return distributed.world_size() > distributed.local_world_size()


def _is_whole(directory: Path, manifest: bytes) -> bool:
    return _manifest(directory) == manifest and not manifest_problems(directory)


def _manifest(directory: Path) -> bytes:
    """Return what tells one checkpoint from another; b"" for none."""
    try:
        return (directory / MANIFEST_FILE).read_bytes()
    except OSError:
        return b""


def _listing(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _sizes(directory: Path, names: Sequence[str]) -> dict[str, int]:
    return {
        name: (directory / name).stat().st_size for name in names if (directory / name).is_file()
    }


def _piece_sizes(size: int) -> Iterator[int]:
    for start in range(0, size, PIECE_BYTES):
        yield min(PIECE_BYTES, size - start)


def _pieces(path: Path, size: int) -> Iterator[Tensor]:
    with path.open("rb") as stream:
        for length in _piece_sizes(size):
            yield torch.frombuffer(bytearray(stream.read(length)), dtype=torch.uint8)


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
