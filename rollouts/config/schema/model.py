"""The model, and adapters on it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on frozen weights (peft); matrix_lr is their learning rate. docs/reference/optimization.md."""

    rank: int  # of each adapter: the width between its two matrices
    alpha: float  # the adapter's output is multiplied by alpha / rank
    dropout: float  # on the adapter's input; 0: none
    target_modules: (
        list[str] | Literal["all-linear"]
    )  # linear layers by name, e.g. ["q_proj"]; all: but for the head
    init_seed: int  # of the adapters' first weights


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    name: str  # hub id, or a directory: absolute on the host, or relative to the repository's root
    init: Literal[
        "pretrained", "random"
    ]  # random: architecture and tokenizer of `name`, weights drawn from init_seed
    init_seed: int  # of the weights that init draws at random
    dtype: Literal["float32", "bfloat16"]  # of the weights and of the computation
    compile: bool  # each layer by itself, once for all of a kind; docs/reference/optimization.md
    # recompute each layer in the backward pass: less memory, about 1.3 x the time
    activation_checkpointing: bool
    lora: LoraConfig | None  # None: all weights are trained
    trust_remote_code: bool  # run the Python code that the model's repository brings
