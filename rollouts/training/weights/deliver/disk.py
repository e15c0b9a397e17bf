"""Deliver weights as a checkpoint directory that the engines can read; in memory (tmpfs) if they share our host."""

import errno
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from rollouts.training import distributed
from rollouts.training.inference.fan_out import update_all
from rollouts.training.inference.http import WeightSyncError
from rollouts.training.inference.inference_engine import InferenceEngine
from rollouts.training.seams import TrainingBackend
from rollouts.training.weights.deliver.far_copies import FarCopies
from rollouts.training.weights.deliver.rewrite import MappedCheckpoint, rewrite


class DiskDelivery:
    """`Delivery` through `directory` (None: `weights` beside the checkpoints), each version in its own subdirectory.

    The last one stays, for an engine that is started again. `dtype`: what the weights are written as; None: as they
    are. `temporary`: the directory is in memory, and `aclose` removes it. Until then two checkpoints in it take turns.
    `far`: those of engines that cannot read it; each gets a copy before any engine loads.
    It needs the clients' `update_weights_from_checkpoint` and the backend's `save_weights` alone.
    """

    def __init__(
        self,
        backend: TrainingBackend,
        directory: Path | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        temporary: bool = False,
        far: FarCopies | None = None,
    ) -> None:
        self._backend = backend
        self._directory = None if directory is None else Path(directory)
        self._dtype = dtype
        self._temporary = temporary
        self._far = far
        self._newest: MappedCheckpoint | None = None  # on tmpfs
        self._spare: MappedCheckpoint | None = None  # the one before, to be written over

    @property
    def directory(self) -> Path:
        return self._directory or Path(self._backend.checkpoint_dir) / "weights"

    async def deliver(self, clients: Sequence[InferenceEngine], version: str) -> None:
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
            if self._far is not None:
                await self._far.send(path)
            await self._update(clients, path, version)
            self._retire(path)
            if self._far is not None:
                await self._far.keep_only(path)

    async def _update(self, clients: Sequence[InferenceEngine], path: Path, version: str) -> None:
        elsewhere = {}
        if self._far is not None:
            for client in clients:
                elsewhere[client.base_url] = await self._far.path_for(client.base_url, path)
        await update_all(clients, str(path), version, elsewhere=elsewhere)

    async def _write(self, path: Path) -> None:
        if self._temporary:
            spare, self._spare = self._spare, None
            if spare is not None:
                spare.move(self.directory / ".writing")  # hide it while it is half-written
            again = partial(rewrite, spare=spare, dtype=self._dtype)
            if await self._backend.on_model(again).result():
                if spare is not None:
                    spare.move(path)
                    self._spare = spare
                return
        await (
            self._backend.save_weights(path, self._dtype)
            if self._dtype
            else self._backend.save_weights(path)
        )

    def _retire(self, path: Path) -> None:
        """Remove the version before, or keep it to be written over."""
        if self._temporary:
            written, self._spare = self._spare, self._newest
            self._newest = written or _mapped(path)
            if self._spare is not None:
                self._spare.move(self.directory / ".spare")
        for other in self.directory.glob("version_*"):
            if other != path:
                shutil.rmtree(other)

    async def restore(self, client: InferenceEngine, version: str) -> None:
        await self._update([client], self._path(version), version)

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None:
        self._newest = self._spare = None
        if self._temporary and distributed.rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, version: str) -> Path:
        return self.directory / f"version_{version.zfill(6)}"


def _mapped(path: Path) -> MappedCheckpoint | None:
    """Return None if the checkpoint cannot be written over: it has several files, or tensors of other kinds."""
    try:
        return MappedCheckpoint(path)
    except (OSError, ValueError):
        return None
