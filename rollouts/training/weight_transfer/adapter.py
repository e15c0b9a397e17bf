"""Kind "lora": the adapter alone, in a directory that the engines can read; the frozen weights are theirs already."""

import shutil
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollouts.training import checkpoint, distributed, lora
from rollouts.training.inference.http import WeightSyncError, require
from rollouts.training.inference.weight_routes import Adapter
from rollouts.training.weight_transfer.fanout import each

PREFIX = "rollouts-"  # of the names that engines know our adapters by


class AdapterTransfer:
    """`Transfer` of a LoRA model's adapter through `directory`, each version in its own; SGLang alone takes it.

    The last one stays, for an engine that is started again. `dtype`: what the adapter is written as; None: as it is.
    `temporary`: the directory is in memory, and `aclose` removes it. An engine that has other weights under the adapter
    than the trainer (a resumed run's engine starts with merged ones) is given the trainer's first, from where those
    were loaded. A request keeps the adapter that it started with to its end, a re-queued one too.
    """

    def __init__(
        self, backend: Any, directory: Path | str, *, dtype: torch.dtype | None = None, temporary: bool = False
    ) -> None:
        self._backend = backend
        self._directory = Path(directory).absolute()
        self._dtype = dtype
        self._temporary = temporary
        self._base = ""  # where the frozen weights were loaded from

    async def __call__(self, engines: Sequence[Any], version: str) -> None:
        path = self._path(version)
        write = partial(_write, path=path, dtype=self._dtype)
        try:
            self._base = await self._backend.on_model(write).result()
        except OSError as error:
            raise WeightSyncError(f"weight sync of version {version}: writing {path}: {error}") from error
        if distributed.rank() == 0:
            await each(engines, f"weight sync of version {version}", partial(self._give, version=version))
            for other in self._directory.glob("version_*"):
                if other != path:
                    shutil.rmtree(other)

    async def restore(self, engine: Any, version: str) -> None:
        await each([engine], f"weight sync of version {version}", partial(self._give, version=version))

    async def aclose(self, engines: Sequence[Any]) -> None:
        if self._temporary and distributed.rank() == 0:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _give(self, engine: Any, version: str) -> None:
        """The name is a new one each time: an engine may have loaded a version that then never served."""
        adapter = Adapter(f"{PREFIX}{version}-{uuid.uuid4().hex[:8]}", version)
        await engine.pause("retract")
        if not _same((await engine.model_info())["model_path"], self._base):
            await engine.update_weights_from_disk(self._base)
        loaded = await engine.load_adapter(adapter.name, str(self._path(version)))
        await engine.flush_cache()
        await engine.update_weight_version(version)
        served = (await engine.model_info())["weight_version"]
        require(served == version, f"serves version {served!r}, needs {version!r}")
        engine.serve_adapter(adapter)
        await engine.resume()
        for name in loaded:  # last: it waits for the requests that name it
            if name != adapter.name and name.startswith(PREFIX):
                await engine.unload_adapter(name)

    def _path(self, version: str) -> Path:
        return self._directory / f"version_{version.zfill(6)}"


def _write(model: nn.Module, *, path: Path, dtype: torch.dtype | None) -> str:
    """Every rank calls it, on the thread that works on the model; rank 0 writes. Where the frozen weights are from."""
    tensors = checkpoint.whole_adapter(model, dtype=dtype)
    if distributed.rank() == 0:
        unfinished = path.with_name(".writing")
        for left in (unfinished, path):
            shutil.rmtree(left, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lora.write_adapter(model, unfinished, tensors)
        unfinished.rename(path)
    return lora.base_record(model)["name"]


def _same(one: str, other: str) -> bool:
    """Both are hub ids, or directories, which may be named by a link."""
    return one == other or Path(one).resolve() == Path(other).resolve()
