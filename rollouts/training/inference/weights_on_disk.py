"""Check a checkpoint directory before a server loads it: SGLang 0.5.21 dies of a damaged file."""

import json
from pathlib import Path


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a Hugging Face directory, by its files' headers alone; None if nothing is.

    A directory that this machine lacks passes: the server will judge it.
    """
    from safetensors import SafetensorError, safe_open

    if not checkpoint.is_dir():
        return None
    index = checkpoint / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = {
                checkpoint / name for name in json.loads(index.read_text())["weight_map"].values()
            }
        else:
            files = set(checkpoint.glob("*.safetensors"))
    except (OSError, ValueError, KeyError) as error:
        return f"{index} cannot be loaded: {error}"
    for file in sorted(files):
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file} cannot be loaded: {error}"
    return None
