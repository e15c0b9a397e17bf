"""Gives engines new weights, all in parallel; no caller goes on with weights that were not proven.

One engine's sync is: pause → load from disk → flush the prefix cache (checked) → read the version back → continue; see
the clients in `rollouts.training.inference`, which this module hands on. Works under asyncio and trio.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import anyio

from rollouts.training.inference.http import EngineError, Generation, WeightSyncError
from rollouts.training.inference.sglang import SGLangEngine
from rollouts.training.inference.vllm import VLLMEngine

__all__ = [
    "Engine",
    "EngineError",
    "Generation",
    "SGLangEngine",
    "VLLMEngine",
    "WeightSyncError",
    "sync_weights_to_engines",
]


class Engine(Protocol):
    """All that `sync_weights_to_engines` needs of an engine. It may take `weight_version` too."""

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        """Serve the checkpoint directory's weights; {"success": bool, ...}."""
        ...


async def sync_weights_to_engines(
    engines: Sequence[Engine], checkpoint_path: str, weight_version: str | None = None
) -> list[dict[str, Any]]:
    """Give all engines the checkpoint's weights, in parallel; their answers, in the engines' order.

    `weight_version` goes to the engines that take one. Raises WeightSyncError when any engine raised or did not answer
    with success true; it names each of them. All engines are waited for first.
    """
    answers: list[dict[str, Any]] = [{} for _ in engines]
    failures: list[str] = []
    causes: list[Exception] = []

    async def sync_one(index: int, engine: Engine) -> None:
        name = getattr(engine, "base_url", None) or repr(engine)
        update: Any = engine.update_weights_from_checkpoint
        versioned = weight_version is not None and "weight_version" in inspect.signature(update).parameters
        try:
            answer = await (
                update(checkpoint_path, weight_version=weight_version) if versioned else update(checkpoint_path)
            )
        except Exception as error:  # engines are duck-typed: whatever one raises is its failure, told with its name
            failures.append(f"{name}: {error or type(error).__name__}")
            causes.append(error)
            return
        if not isinstance(answer, dict) or answer.get("success") is not True:
            failures.append(f"{name}: answered {answer!r}, needs success true")
            return
        answers[index] = answer

    async with anyio.create_task_group() as group:
        for index, engine in enumerate(engines):
            group.start_soon(sync_one, index, engine)
    if failures:
        count = f"{len(failures)} of {len(engines)} engines did not take {checkpoint_path}"
        raise WeightSyncError("; ".join([count, *failures])) from (causes[0] if causes else None)
    return answers
