"""The job's config: schema, checks, files. Standard library only.

A config file is Python that builds one module-level `config = Config(...)`. No field has a default, so the file shows
exactly what runs. Where a number may be switched off, -1 says so, and the field's comment says what that means.
"""

from rollouts.config.changed import changed
from rollouts.config.config import Config
from rollouts.config.load import load_config
from rollouts.config.schema import (
    AgentConfig,
    DataConfig,
    DatasetSpec,
    EngineConfig,
    EvalConfig,
    HostConfig,
    LimitsConfig,
    LoraConfig,
    ModelConfig,
    MuonConfig,
    OptimizerConfig,
    OutputConfig,
    RLConfig,
    SFTConfig,
    TargetConfig,
)
from rollouts.config.source import as_source
from rollouts.config.types import ConfigError

__all__ = [
    "AgentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DatasetSpec",
    "EngineConfig",
    "EvalConfig",
    "HostConfig",
    "LimitsConfig",
    "LoraConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "OutputConfig",
    "RLConfig",
    "SFTConfig",
    "TargetConfig",
    "as_source",
    "changed",
    "load_config",
]
