"""The job's schema: frozen dataclasses, one a section, without defaults. Each field's comment is its documentation."""

from rollouts.config.schema.data import DataConfig, DatasetSpec
from rollouts.config.schema.engine import (
    VLLM,
    BroadcastSync,
    DiskSync,
    Embedded,
    EngineConfig,
    LoraSync,
    SGLang,
    TensorSync,
)
from rollouts.config.schema.evaluation import EvalConfig
from rollouts.config.schema.loss import (
    CISPO,
    GRPO,
    GSPO,
    PPO,
    ImportanceConfig,
    KLConfig,
    ValueModel,
)
from rollouts.config.schema.model import LoraConfig, ModelConfig
from rollouts.config.schema.optimizer import MuonConfig, OptimizerConfig
from rollouts.config.schema.provision import ProvisionConfig
from rollouts.config.schema.rl import (
    AgentConfig,
    AheadConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
)
from rollouts.config.schema.run import HostConfig, LimitsConfig, OutputConfig, TargetConfig
from rollouts.config.schema.sections import Sections
from rollouts.config.schema.sft import SFTConfig
from rollouts.config.schema.trackers import Mlflow, TensorBoard, Trackio, Wandb

__all__ = [
    "CISPO",
    "GRPO",
    "GSPO",
    "PPO",
    "VLLM",
    "AgentConfig",
    "AheadConfig",
    "BroadcastSync",
    "DataConfig",
    "DatasetSpec",
    "DiskSync",
    "Embedded",
    "EngineConfig",
    "EvalConfig",
    "HostConfig",
    "ImportanceConfig",
    "KLConfig",
    "LimitsConfig",
    "LoraConfig",
    "LoraSync",
    "Mlflow",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ProvisionConfig",
    "RLConfig",
    "RewardConfig",
    "SFTConfig",
    "SGLang",
    "SamplingConfig",
    "Sections",
    "TargetConfig",
    "TensorBoard",
    "TensorSync",
    "Trackio",
    "ValueModel",
    "Wandb",
]
