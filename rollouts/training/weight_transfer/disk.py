"""Kind "disk": a checkpoint directory that the engines can read; in memory (tmpfs) where they share a host with us."""

import errno
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rollouts.training import distributed
from rollouts.training.inference.http import WeightSyncError
from rollouts.training.weight_sync import sync_weights_to_engines
from rollouts.training.weight_transfer.rewrite import MappedCheckpoint, rewrite


class DiskTransfer:
    """`Transfer` through `directory` (None: `weights` beside the checkpoints), each version in its own.

    The last one stays, for an engine that is started again. `dtype`: what the weights are written as; None: as they
    are. `temporary`: it is in memory; `aclose` removes it, and until then two checkpoints in it take turns. Engines
    are anything with `update_weights_from_checkpoint`, the backend anything with `save_weights`.
    """

    def __init__(
        self,
        backend: Any,
        directory: Path | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        temporary: bool = False,
    ) -> None:
        self._backend = backend
        self._directory = None if directory is None else Path(directory)
        self._options = {} if dtype is None else {"dtype": dtype}
        self._temporary = temporary
        self._standing: MappedCheckpoint | None = None  # on tmpfs: the last version
        self._spare: MappedCheckpoint | None = None  # and the one before, to be written over

    @property
    def directory(self) -> Path:
        return self._directory or Path(self._backend.checkpoint_dir) / "weights"

    async def __call__(self, engines: Sequence[Any], version: str) -> None:
        path = self._path(version)
        try:
            await self._write(path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            fix = "; or set engine.weight_sync.on_tmpfs=False" if self._temporary else ""
            room = f"no room in {self.directory} for two versions of the weights{fix}"
            raise WeightSyncError(f"weight sync of version {version}: {room}") from error
        if distributed.rank() == 0:
            await sync_weights_to_engines(engines, str(path), weight_version=version)
            self._retire(path)

    async def _write(self, path: Path) -> None:
        if self._temporary and hasattr(self._backend, "on_model"):
            spare, self._spare = self._spare, None
            if spare is not None:
                spare.move(self.directory / ".writing")  # it is no version while it is neither
            again = partial(rewrite, spare=spare, dtype=self._options.get("dtype"))
            if await self._backend.on_model(again).result():
                if spare is not None:
                    spare.move(path)
                    self._spare = spare
                return
        await self._backend.save_weights(path, **self._options)

    def _retire(self, path: Path) -> None:
        """The version before is removed, or kept to be written over."""
        standing = None
        if self._temporary:
            written, self._spare = self._spare, self._standing
            standing = written or _mapped(path)
            if self._spare is not None:
                self._spare.move(self.directory / ".spare")
        self._standing = standing
        for other in self.directory.glob("version_*"):
            if other != path:
                shutil.rmtree(other)

    async def restore(self, engine: Any, version: str) -> None:
        await sync_weights_to_engines([engine], str(self._path(version)), weight_version=version)

    async def aclose(self, engines: Sequence[Any]) -> None:
        self._standing = self._spare = None
        if self._temporary and distributed.rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, version: str) -> Path:
        return self.directory / f"version_{version.zfill(6)}"


def _mapped(path: Path) -> MappedCheckpoint | None:
    """None where the checkpoint cannot be written over: of several files, or with tensors of other kinds."""
    try:
        return MappedCheckpoint(path)
    except (OSError, ValueError):
        return None
