"""Deliver a LoRA adapter alone, in a directory that the engines can read. They have the frozen weights already."""

import shutil
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rollouts.training import distributed, lora
from rollouts.training.inference.fan_out import on_all_engines
from rollouts.training.inference.http import WeightSyncError, require
from rollouts.training.inference.inference_engine import InferenceEngine, routes_of
from rollouts.training.inference.weight_routes import Adapter
from rollouts.training.seams import TrainingBackend
from rollouts.training.whole_tensors import whole_adapter

PREFIX = "rollouts-"  # of our adapters' names at engines


class AdapterDelivery:
    """`Delivery` of a LoRA model's adapter through `directory`, each version in its own subdirectory. Only SGLang takes
    it.

    The last one stays, for an engine that is started again. `dtype`: what the adapter is written as; None: as it is.
    `temporary`: the directory is in memory, and `aclose` removes it. An engine may have other frozen weights than the
    trainer (a resumed run's engine starts with merged ones): it first loads the trainer's, from their directory. A
    request keeps its adapter to the end, even if it is re-queued.
    """

    def __init__(
        self,
        backend: TrainingBackend,
        directory: Path | str,
        *,
        dtype: torch.dtype | None = None,
        temporary: bool = False,
    ) -> None:
        self._backend = backend
        self._directory = Path(directory).absolute()
        self._dtype = dtype
        self._temporary = temporary
        self._base = ""  # where the frozen weights were loaded from

    async def deliver(self, clients: Sequence[InferenceEngine], version: str) -> None:
        path = self._path(version)
        write = partial(_write, path=path, dtype=self._dtype)
        try:
            self._base = await self._backend.on_model(write).result()
        except OSError as error:
            raise WeightSyncError(
                f"weight sync of version {version}: writing {path}: {error}"
            ) from error
        if distributed.rank() == 0:
            await self._give_all(clients, version)
            for other in self._directory.glob("version_*"):
                if other != path:
                    shutil.rmtree(other)

    async def restore(self, client: InferenceEngine, version: str) -> None:
        await self._give_all([client], version)

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None:
        if self._temporary and distributed.rank() == 0:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _give_all(self, clients: Sequence[InferenceEngine], version: str) -> None:
        await on_all_engines(
            clients, f"weight sync of version {version}", partial(self._give, version=version)
        )

    async def _give(self, client: InferenceEngine, version: str) -> None:
        """Run the cycle for one engine. The name is new each time: an engine may have loaded a version in vain."""
        adapter, routes = (
            Adapter(f"{PREFIX}{version}-{uuid.uuid4().hex[:8]}", version),
            routes_of(client),
        )
        await client.pause("retract")
        if not _same((await client.model_info())["model_path"], self._base):
            await routes.update_weights_from_disk(self._base)
        loaded = await routes.load_adapter(adapter.name, str(self._path(version)))
        await client.flush_cache()
        await routes.update_weight_version(version)
        served = (await client.model_info())["weight_version"]
        require(served == version, f"serves version {served!r}, needs {version!r}")
        routes.serve_adapter(adapter)
        await client.resume()
        for name in loaded:  # last: it waits for the requests that name it
            if name != adapter.name and name.startswith(PREFIX):
                await routes.unload_adapter(name)

    def _path(self, version: str) -> Path:
        return self._directory / f"version_{version.zfill(6)}"


def _write(model: nn.Module, *, path: Path, dtype: torch.dtype | None) -> str:
    """Write the adapter, on rank 0. Return where the frozen weights are from. Every rank calls it, on the thread that
    works on the model."""
    tensors = whole_adapter(model, dtype=dtype)
    if distributed.rank() == 0:
        unfinished = path.with_name(".writing")
        for left in (unfinished, path):
            shutil.rmtree(left, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lora.write_adapter(model, unfinished, tensors)
        unfinished.rename(path)
    return lora.base_record(model)["name"]


def _same(one: str, other: str) -> bool:
    """Return whether two hub ids, or directories, which may be links, are the same."""
    return one == other or Path(one).resolve() == Path(other).resolve()
