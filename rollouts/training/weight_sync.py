"""The public names for engines and their weights: what the pages of the library show. Our own code imports the parts.

One engine's update is: pause → load from disk → flush the prefix cache (checked) → read the version back → resume. It
works under asyncio and trio.
"""

from collections.abc import Sequence
from typing import Any

from rollouts.training.inference.adapted_engine import as_client
from rollouts.training.inference.fan_out import update_all
from rollouts.training.inference.http import EngineError, Generation, WeightSyncError
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.training.inference.vllm_client import VLLMEngine

__all__ = [
    "EngineError",
    "Generation",
    "SGLangEngine",
    "VLLMEngine",
    "WeightSyncError",
    "sync_weights_to_engines",
]


async def sync_weights_to_engines(
    engines: Sequence[object], checkpoint_path: str, weight_version: str | None = None
) -> list[dict[str, Any]]:
    """Have all engines load the checkpoint's weights, in parallel. Return their answers, in the engines' order.

    An engine needs `update_weights_from_checkpoint(checkpoint_path)`, which returns {"success": bool, ...}. It gets
    `weight_version` if it takes one. Raises WeightSyncError after all have answered, if any raised or did not answer
    with success true. The message names each of them.
    """
    return await update_all(list(map(as_client, engines)), checkpoint_path, weight_version)
