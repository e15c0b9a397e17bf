"""All sections of a job together."""

from dataclasses import dataclass
from typing import Literal

from rollouts.config.schema.data import DataConfig
from rollouts.config.schema.engine import EngineConfig
from rollouts.config.schema.evaluation import EvalConfig
from rollouts.config.schema.model import ModelConfig
from rollouts.config.schema.provision import ProvisionConfig
from rollouts.config.schema.rl import ENGINE_SOURCES, RLConfig
from rollouts.config.schema.run import HostConfig, LimitsConfig, OutputConfig, TargetConfig
from rollouts.config.schema.sft import SFTConfig


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The fields of a `Config`, without what checks, reads and writes it."""

    target: TargetConfig
    host: HostConfig
    model: ModelConfig
    data: DataConfig
    sft: SFTConfig | None  # None only where output.mode has no sft stage
    rl: RLConfig | None  # None only where output.mode has no rl stage
    eval: EvalConfig
    engine: EngineConfig | None  # None only where nothing samples
    limits: LimitsConfig
    output: OutputConfig
    provision: ProvisionConfig | None  # a machine to rent; None: this one, or --remote

    @property
    def stages(self) -> tuple[Literal["sft", "rl"], ...]:
        """Return the stages that `output.mode` selects, in order."""
        return tuple(stage for stage in ("sft", "rl") if stage in self.output.mode.split("+"))

    @property
    def uses_engine(self) -> bool:
        """Return whether the run samples from an inference engine."""
        return (
            "rl" in self.stages
            and self.rl is not None
            and self.rl.sampling.source in ENGINE_SOURCES
        )

    @property
    def engine_hosts(self) -> list[int]:
        """Return which hosts of the job run engines, in order; [] if nothing samples."""
        if not self.uses_engine or self.engine is None:
            return []
        return [0] if self.engine.hosts is None else self.engine.hosts

    @property
    def job_hosts(self) -> int:
        """Return how many hosts the job has: those that train come first."""
        return max(self.target.hosts, 1 + max(self.engine_hosts, default=0))
