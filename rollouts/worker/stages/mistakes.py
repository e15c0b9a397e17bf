"""The errors of a stage that a user can mend: the trainer shows them in one line."""

from rollouts.agents.episode import AgentError
from rollouts.data_formats.row import DataError
from rollouts.training.checkpoint import CheckpointError
from rollouts.training.devices import DeviceError
from rollouts.training.inference.http import EngineError
from rollouts.training.loops.train_step import StepsError
from rollouts.training.model_loading import ModelError
from rollouts.training.rewards import RewardError
from rollouts.training.rollout_gen.async_rollout_manager import RolloutError

MISTAKES: tuple[type[Exception], ...] = (
    StepsError,
    DataError,
    RewardError,
    AgentError,
    RolloutError,
    CheckpointError,
    DeviceError,
    EngineError,
    ModelError,
    FloatingPointError,  # training diverged: a learning rate mends that
)
