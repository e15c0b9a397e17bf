"""Choose the client for a kind of server."""

from typing import Any

from rollouts.training.inference.inference_engine import ServerKind
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.training.inference.vllm_client import VLLMEngine

CLIENTS: dict[ServerKind, type[SGLangEngine] | type[VLLMEngine]] = {
    "embedded": SGLangEngine,  # speaks SGLang's routes
    "sglang": SGLangEngine,
    "vllm": VLLMEngine,
}


def engine_client(kind: ServerKind, base_url: str, **options: Any) -> SGLangEngine | VLLMEngine:
    """Return the client for a server of this kind; options as HTTPClient has them: timeout_s, api_key, admin_key."""
    return CLIENTS[kind](base_url, **options)
