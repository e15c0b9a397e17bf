"""Where a run takes place, how long it may take, and where its results land."""

from dataclasses import dataclass
from typing import Literal

from rollouts.config.schema.trackers import Mlflow, TensorBoard, TrackerConfig, Trackio, Wandb


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which devices train, and how the model is spread over them."""

    hosts: int  # that train together, as many --remote. More than 1: docs/guide/several-hosts.md
    # with limits.restarts_max: where hosts die, the run goes on with so many; = hosts: it ends
    hosts_min: int
    gpu_ranks: list[
        int
    ]  # device indices of each host: a rank of the trainer each. On cpu: one process per entry
    device_type: Literal[
        "cuda", "cpu", "mps"
    ]  # where the trainer runs; mps: Apple's GPUs, one process
    sharding: Literal[
        "none", "full_shard", "shard_grad_op", "hybrid_shard"
    ]  # docs/reference/sharding.md; none: a whole copy each
    # hybrid_shard: ranks that share one copy, usually those of a node; -1: unused
    shard_group_size: int
    # parameters, gradients and optimizer state wait in host memory; needs sharding
    cpu_offload: bool

    @property
    def world_size(self) -> int:
        """Return the number of the trainer's ranks, over all hosts."""
        return self.hosts * len(self.gpu_ranks)


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How the host is made ready."""

    installer: Literal["uv", "pip"]  # what fills the virtual environments
    requirements: list[
        str
    ]  # more packages for the trainer's environment, for your rewards: ["levenshtein>=0.26"]
    # pip constraints: a path, or "rollouts:requirements/…"; None installs unconstrained
    constraints_file: str | None
    torch_build: Literal[
        "auto", "cpu", "cu126", "cu128", "cu130", "index"
    ]  # auto: by device and driver; index: pip's
    env: dict[
        str, str
    ]  # set for every process of the run; shown in plans and saved: no secrets here
    secrets: list[
        str
    ]  # names of variables read here and handed to the run over stdin; never stored here
    disk_free_gib_min: float  # refuse to start with less room than this on the host
    threads_per_process: int  # OMP_NUM_THREADS of each trainer rank and of the engine


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How long things may take, in seconds, before the run fails with a message; and how often it is tried again."""

    bootstrap_timeout_s: float  # environments and models, before the first stage
    engine_ready_timeout_s: float  # from an engine's start to its first answer
    stage_timeout_s: float  # one stage, sft or rl, as a whole
    engine_hang_timeout_s: float  # an engine that lives and does not answer for so long is hung
    sample_timeout_s: float  # one generation request
    # one sample's reward; a group with a longer one is left out and counted
    reward_timeout_s: float
    stop_grace_s: float  # between asking a process to end and killing it
    restarts_max: int  # of stages whose trainer was killed or crashed, in all; 0: the run ends


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is run, what it is called, and where results land."""

    save_dir: str  # where results land on this machine: <save_dir>/<experiment_name>/<run_id>/
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]  # of the trainer's log
    experiment_name: str  # runs of one name lie in one folder
    use_wandb: bool  # log to Weights & Biases as well: short for a Wandb in trackers
    wandb_project: str  # of Weights & Biases, where use_wandb is True
    # experiment trackers that a process beside the trainer feeds, one of a kind; []: none
    trackers: list[Wandb | Trackio | Mlflow | TensorBoard]
    mode: Literal["sft", "rl", "sft+rl"]  # the stages, in order
    # a checkpoint directory on the host: the first stage starts from it, or resumes it
    source_checkpoint: str | None
    # of each stage on the host, the last ones; -1: all. What a run resumed from stays too
    checkpoints_keep: int
    checkpoint_best: dict[
        str, str
    ]  # stage -> "min <metric>" or "max <metric>": kept too; {}: by age alone
    # a shell command on the host at the run's end, whatever the end; saved: no secrets in it
    on_end: str | None
    # a shell command on the host for each warning of a health rule: docs/reference/symptoms.md
    on_warning: str | None

    @property
    def fed(self) -> list[TrackerConfig]:
        """Return the trackers that the run is fed into: use_wandb's comes first."""
        short = [Wandb(project=self.wandb_project, offline=False)] if self.use_wandb else []
        return [*short, *self.trackers]
