"""Whether a directory's weights can be read, before a server is sent there: SGLang 0.5.21 dies of a damaged file."""

import json
from pathlib import Path


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a Hugging Face directory of this machine, of its files' headers alone; None: nothing is.

    A directory that this machine does not have is the server's to judge.
    """
    from safetensors import SafetensorError, safe_open

    if not checkpoint.is_dir():
        return None
    index = checkpoint / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = {checkpoint / name for name in json.loads(index.read_text())["weight_map"].values()}
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
