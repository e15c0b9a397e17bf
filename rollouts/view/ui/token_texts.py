"""Texts of token ids, by a tokenizer.json that lies here: in a checkpoint, in the run's code, in the hub's cache."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rollouts.run_dir import RunDir

FILE = "tokenizer.json"
BYTES_MAX = 64 << 20
Decode = Callable[[Sequence[int]], list[str]]


def tokenizer_file(run: RunDir, model: str) -> Path | None:
    """Return the tokenizer of a run whose config names `model`; None where none lies here."""
    for place in _places(run, model):
        if place.is_file() and place.stat().st_size <= BYTES_MAX:
            return place
    return None


def _places(run: RunDir, model: str) -> list[Path]:
    saved = sorted(run.checkpoints.glob(f"*/step_*/{FILE}"), reverse=True)
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    named = []
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)*", model) and ".." not in model:
        named = [run.code_tree / model / FILE]
        named += sorted(
            (hub / f"models--{model.replace('/', '--')}" / "snapshots").glob(f"*/{FILE}")
        )
    return [*saved, *named]


@functools.lru_cache(maxsize=2)
def decoder(file: Path) -> Decode | None:
    """Return what makes texts of ids, one an id; None for a file that is no tokenizer, or without `tokenizers`."""
    try:
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream

        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises Exception itself for a damaged file
        return None

    def decode(ids: Sequence[int]) -> list[str]:
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(tokenizer, token) or "" for token in ids]

    return decode
