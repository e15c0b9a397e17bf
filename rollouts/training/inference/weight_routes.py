"""Change the weights of an SGLang server piece by piece: tensors, files, adapters, and the memory they take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.training.inference.http import EngineError, HTTPClient


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that a server has loaded."""

    name: str  # by which the server knows it
    version: str  # of the weights: the server's own ones with this adapter


class WeightRoutes:
    """`SGLangEngine.weights`. Every call raises EngineError unless the server says that it succeeded."""

    def __init__(self, http: HTTPClient) -> None:
        self._http = http
        self.adapter: Adapter | None = (
            None  # that all requests name; None: they get the server's own weights
        )

    async def begin_weight_update(self) -> None:
        """Open a session. The server refuses tensors outside of one."""
        await self._succeed("/begin_weight_update", {"selector": "all"})

    async def end_weight_update(self) -> None:
        """Close the session. The server refuses while some of the model's tensors have not come."""
        await self._succeed("/end_weight_update", {})

    async def update_weights_from_tensor(
        self, messages: Sequence[str], weight_version: str | None
    ) -> None:
        """Load one bucket, of which `weights.wire` makes a message for each tensor-parallel rank."""
        body = {"serialized_named_tensors": list(messages), **_bucket(weight_version)}
        await self._succeed("/update_weights_from_tensor", body)

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group_name: str,
        weight_version: str | None,
    ) -> None:
        """Receive one bucket from rank 0 of the group. Returns once it is loaded. `dtypes` as in "bfloat16"."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
        }
        await self._succeed(
            "/update_weights_from_distributed",
            {**body, "group_name": group_name, **_bucket(weight_version)},
        )

    async def update_weights_from_disk(self, model_path: str) -> None:
        """Load a Hugging Face directory or hub id. The caller pauses, flushes and names the version."""
        await self._succeed(
            "/update_weights_from_disk", {"model_path": model_path, "flush_cache": False}
        )

    async def update_weight_version(self, version: str) -> None:
        """Name the weights that the server has: `model_info` reports this version from now on."""
        await self._succeed(
            "/update_weight_version", {"new_version": version, "abort_all_requests": False}
        )

    async def load_adapter(self, name: str, path: str) -> set[str]:
        """Load the LoRA adapter in the directory `path`, in peft's layout. Return the names of all loaded ones."""
        answer = await self._succeed("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        return set(answer["loaded_adapters"])

    async def unload_adapter(self, name: str) -> None:
        """Unload the adapter. Returns once no running request names it."""
        await self._succeed("/unload_lora_adapter", {"lora_name": name})

    def serve_adapter(self, adapter: Adapter) -> None:
        """Name it in all requests from now on. Running requests keep theirs."""
        self.adapter = adapter

    async def init_weights_update_group(
        self,
        address: str,
        port: int,
        *,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        """Join a process group as ranks `rank_offset`... Returns once all members have joined."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
        }
        await self._succeed(
            "/init_weights_update_group", {**body, "group_name": group_name, "backend": backend}
        )

    async def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave the process group."""
        await self._succeed("/destroy_weights_update_group", {"group_name": group_name})

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Free GPU memory: "weights", "kv_cache", "cuda_graph". Needs --enable-memory-saver and an idle server."""
        await self._http.request("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory again. The weights in "weights" are lost, so they must be sent again."""
        await self._http.request("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def _succeed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.request("POST", path, body)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise EngineError(f"{self._http.base_url}{path}: {answer!r:.500}")
        return answer


def _bucket(weight_version: str | None) -> dict[str, Any]:
    """Return what all buckets say. They do not flush: a refused flush would be a 400 after the weights have changed."""
    return {
        "load_format": "flattened_bucket",
        "flush_cache": False,
        "weight_version": weight_version,
    }
