"""From the kind of a server to its client."""

from typing import Any

from rollouts.training.inference.client import EngineClient
from rollouts.training.inference.protocol import ServerKind
from rollouts.training.inference.sglang import SGLangEngine
from rollouts.training.inference.vllm import VLLMEngine

CLIENTS: dict[ServerKind, type[EngineClient]] = {
    "embedded": SGLangEngine,  # speaks SGLang's routes
    "sglang": SGLangEngine,
    "vllm": VLLMEngine,
}


def engine_client(kind: ServerKind, base_url: str, **options: Any) -> EngineClient:
    """The client of a server of this kind; options as HTTPEngine has them: timeout_s, api_key, admin_key."""
    return CLIENTS[kind](base_url, **options)
