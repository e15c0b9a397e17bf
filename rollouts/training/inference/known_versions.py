"""The versions of each server that the contract tests ran on."""

from collections.abc import Mapping

from rollouts.training.inference.http import EngineError
from rollouts.training.inference.inference_engine import ServerKind

# scripts/contract ran on each of these; SGLang's and vLLM's on a CPU. No other file lists versions.
KNOWN_VERSIONS: Mapping[ServerKind, tuple[str, ...]] = {
    "embedded": ("1",),  # rollouts.engines.embedded.generate_request.VERSION
    "sglang": ("0.5.21",),
    "vllm": ("0.32.0",),
}


def check_version(url: str, kind: ServerKind, version: object) -> str:
    """Return `version` if it is a known one. Raises EngineError with what was found, what is known, and the fix."""
    known = KNOWN_VERSIONS[kind]
    plain = str(version).split("+")[0]  # a local build's suffix, as in 0.32.0+cpu
    if plain not in known:
        raise EngineError(
            f"{url}: {kind} {version} is not a version this client knows.\n"
            f"  known   {', '.join(known)}\n"
            "  fix     install one of these (requirements/ has the locks), or read the new version's routes, run "
            "scripts/contract on it, and add it to KNOWN_VERSIONS in rollouts/training/inference/known_versions.py"
        )
    return plain
