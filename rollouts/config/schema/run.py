"""Where a run takes place, how long it may take, and where its results land."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which devices train, and how the model is spread over them."""

    hosts: int  # hosts that train together, as many --remote; more than 1: docs/guide/several-hosts.md
    gpu_ranks: list[int]  # device indices of each host: a rank of the trainer each. On cpu: one process per entry
    device_type: Literal["cuda", "cpu", "mps"]  # where the trainer runs; mps: Apple's GPUs, one process
    sharding: Literal[
        "none", "full_shard", "shard_grad_op", "hybrid_shard"
    ]  # docs/reference/sharding.md; none: a whole copy each
    shard_group_size: int  # hybrid_shard: ranks that share one copy, usually those of a node; -1: unused
    cpu_offload: bool  # parameters, gradients and optimizer state wait in host memory; needs sharding

    @property
    def world_size(self) -> int:
        """Return the number of the trainer's ranks, over all hosts."""
        return self.hosts * len(self.gpu_ranks)


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How the host is made ready."""

    installer: Literal["uv", "pip"]  # what fills the virtual environments
    requirements: list[str]  # more packages for the trainer's environment, for your rewards: ["levenshtein>=0.26"]
    constraints_file: str | None  # pip constraints: a path, or "rollouts:requirements/…"; None installs unconstrained
    torch_build: Literal["auto", "cpu", "cu126", "cu128", "cu130", "index"]  # auto: by device and driver; index: pip's
    env: dict[str, str]  # set for every process of the run; shown in plans and saved: no secrets here
    secrets: list[str]  # names of variables read here and handed to the run over stdin; never stored here
    disk_free_gib_min: float  # refuse to start with less room than this on the host
    threads_per_process: int  # OMP_NUM_THREADS of each trainer rank and of the engine


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How long things may take, in seconds, before the run fails with a message."""

    bootstrap_timeout_s: float  # environments and models, before the first stage
    engine_ready_timeout_s: float  # from an engine's start to its first answer
    stage_timeout_s: float  # one stage, sft or rl, as a whole
    engine_hang_timeout_s: float  # an engine that lives and does not answer for so long is hung
    sample_timeout_s: float  # one generation request
    reward_timeout_s: float  # one sample's reward; a group with one that took longer is left out and counted
    stop_grace_s: float  # between asking a process to end and killing it


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is run, what it is called, and where results land."""

    save_dir: str  # where results land on this machine: <save_dir>/<experiment_name>/<run_id>/
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]  # of the trainer's log
    experiment_name: str  # runs of one name lie in one folder
    use_wandb: bool  # log to Weights & Biases as well
    wandb_project: str  # of Weights & Biases, where use_wandb is True
    mode: Literal["sft", "rl", "sft+rl"]  # the stages, in order
    source_checkpoint: str | None  # a checkpoint directory on the host: the first stage starts from it, or resumes it
    checkpoints_keep: int  # of each stage on the host, the last ones; -1: all. What a run resumed from stays too
    checkpoint_best: dict[str, str]  # stage -> "min <metric>" or "max <metric>": kept too; {}: by age alone
    on_end: str | None  # a shell command on the host at the run's end, whatever the end; saved: no secrets in it
