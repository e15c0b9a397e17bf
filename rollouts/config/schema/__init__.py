"""The job's schema: frozen dataclasses, one a section, without defaults. Each field's comment is its documentation."""

from rollouts.config.schema.data import DataConfig, DatasetSpec
from rollouts.config.schema.engine import EngineConfig
from rollouts.config.schema.evaluation import EvalConfig
from rollouts.config.schema.model import LoraConfig, ModelConfig
from rollouts.config.schema.optimizer import MuonConfig, OptimizerConfig
from rollouts.config.schema.rl import AgentConfig, RLConfig
from rollouts.config.schema.run import HostConfig, LimitsConfig, OutputConfig, TargetConfig
from rollouts.config.schema.sections import Sections
from rollouts.config.schema.sft import SFTConfig

__all__ = [
    "AgentConfig",
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
    "Sections",
    "TargetConfig",
]
