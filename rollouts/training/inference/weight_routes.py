"""The routes of an SGLang server that change its weights, and those that show which ones it serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.training.inference.http import EngineError, EngineLost, HTTPEngine


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that a server has loaded."""

    name: str  # what the server knows it by
    version: str  # of the weights: the server's own ones with this adapter


class WeightRoutes(HTTPEngine):
    """Part of `SGLangEngine`. Every call raises EngineError when the server does not say that it succeeded."""

    adapter: Adapter | None = None  # that all requests name; None: they get the server's own weights

    async def begin_weight_update(self) -> None:
        """Open a session: what sends tensors is refused outside of one."""
        await self._succeed("/begin_weight_update", {"selector": "all"})

    async def end_weight_update(self) -> None:
        await self._succeed("/end_weight_update", {})

    async def update_weights_from_tensor(self, messages: Sequence[str], weight_version: str | None) -> None:
        """One bucket of `weight_transfer.payload`, a message for each tensor-parallel rank."""
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
        """Receive one bucket from rank 0 of the group; answers once it is loaded. `dtypes` as in "bfloat16"."""
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        await self._succeed(
            "/update_weights_from_distributed", {**body, "group_name": group_name, **_bucket(weight_version)}
        )

    async def update_weights_from_disk(self, model_path: str) -> None:
        """Load a Hugging Face directory or hub id, and nothing else: a step of a sync."""
        await self._succeed("/update_weights_from_disk", {"model_path": model_path, "flush_cache": False})

    async def update_weight_version(self, version: str) -> None:
        """What `model_info` reports from now on."""
        await self._succeed("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def load_adapter(self, name: str, path: str) -> set[str]:
        """Load the LoRA adapter in the directory `path`, in peft's layout; the names of all that are loaded then."""
        answer = await self._succeed("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        return set(answer["loaded_adapters"])

    async def unload_adapter(self, name: str) -> None:
        """Answers once no request that names it runs."""
        await self._succeed("/unload_lora_adapter", {"lora_name": name})

    def serve_adapter(self, adapter: Adapter) -> None:
        """All requests from now on name it; those that run keep theirs."""
        self.adapter = adapter

    async def init_weights_update_group(
        self, address: str, port: int, *, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Join a process group as ranks `rank_offset`...; answers once all have."""
        body = {"master_address": address, "master_port": port, "rank_offset": rank_offset, "world_size": world_size}
        await self._succeed("/init_weights_update_group", {**body, "group_name": group_name, "backend": backend})

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._succeed("/destroy_weights_update_group", {"group_name": group_name})

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give GPU memory back: "weights", "kv_cache", "cuda_graph". Needs --enable-memory-saver and an idle server."""
        await self._request("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it again. What "weights" held is gone: send them."""
        await self._request("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """[T-1] natural log-probs of all but the first of T tokens, at temperature 1. Nothing is sampled."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._generate(body, self.adapter)
        try:
            entries = answer["meta_info"]["input_token_logprobs"]
            if len(entries) == len(input_ids):  # of the ids it echoes, SGLang shows the vocabulary's last one as 0
                return [float(entry[0]) for entry in entries[1:]]
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{self.base_url}/generate: an answer without {error}: {str(answer)[:200]}") from error
        raise EngineError(f"{self.base_url}/generate: {len(entries)} log-probs of {len(input_ids)} tokens")

    async def _generate(self, body: Mapping[str, Any], adapter: Adapter | None) -> Any:
        """The answer of /generate. Raises EngineLost for an adapter that a server started anew does not have."""
        if adapter is None:
            return await self._request("POST", "/generate", body)
        try:
            return await self._request("POST", "/generate", {**body, "lora_path": adapter.name})
        except EngineLost:
            raise
        except EngineError as error:
            served = (await self._request("GET", "/model_info"))["weight_version"]
            if served == adapter.version:
                raise
            started_anew = f"serves version {served!r}, and was given the adapter of {adapter.version!r}"
            raise EngineLost(f"{self.base_url}: {started_anew}: {error}") from error

    async def _succeed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._request("POST", path, body)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise EngineError(f"{self.base_url}{path}: {answer!r:.500}")
        return answer


def _bucket(weight_version: str | None) -> dict[str, Any]:
    """Flushing the cache is a step of its own: a refusal of it here would be a 400 after the weights have changed."""
    return {"load_format": "flattened_bucket", "flush_cache": False, "weight_version": weight_version}
