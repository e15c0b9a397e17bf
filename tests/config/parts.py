"""Parts of a config that tests break, and a config with some of its values changed."""

import dataclasses
from typing import Any

from base_config import (
    AgentConfig,
    Config,
    LoraConfig,
    MuonConfig,
    OptimizerConfig,
)
from tests.example_config import (
    example_config,
    replace_at,
)


def agent(**changes: Any) -> AgentConfig:
    valid = {
        "environment": "a.B",
        "tool_format": "hermes",
        "turns_max": 2,
        "tokens_max": 64,
        "timeout_s": 1.0,
    }
    return AgentConfig(**{**valid, **changes})


def a_lora(**changes: Any) -> LoraConfig:
    valid = {
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "init_seed": 0,
    }
    return LoraConfig(**{**valid, **changes})


def a_muon(**changes: Any) -> MuonConfig:
    constants = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}
    valid = {**constants, "adjust_lr": "original", "vector_lr": 0.01, "width_reference": 768}
    return MuonConfig(**{**valid, **changes})


def muon_optimizer(**changes: Any) -> OptimizerConfig:
    optimizer = example_config().sft.optimizer  # type: ignore[union-attr]
    return dataclasses.replace(optimizer, muon=a_muon(**changes))


def with_changes(changes: dict[str, Any]) -> Config:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config
