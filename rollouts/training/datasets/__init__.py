"""Data sets: from rows to samples and prompts. Names are loaded on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollouts.training.datasets.data_buffer import DataBuffer
    from rollouts.training.datasets.dataset_loaders import (
        load_prompt_mixture,
        load_prompts_from_jsonl,
        load_sft_dataset,
        load_sft_mixture,
    )

_MODULE_OF = {
    "DataBuffer": "data_buffer",
    "load_prompt_mixture": "dataset_loaders",
    "load_prompts_from_jsonl": "dataset_loaders",
    "load_sft_dataset": "dataset_loaders",
    "load_sft_mixture": "dataset_loaders",
}

__all__ = [
    "DataBuffer",
    "load_prompt_mixture",
    "load_prompts_from_jsonl",
    "load_sft_dataset",
    "load_sft_mixture",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
