"""The training backend of a stage: model, loss, optimizer, reference, value model, and which checkpoints it keeps."""

from functools import partial
from pathlib import Path

import torch

from rollouts.config import Config, RLConfig, SFTConfig
from rollouts.run_dir import RunDir, append_event
from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.checkpoint import Retention
from rollouts.training.optim import lr_factor
from rollouts.training.rl_losses import sft_loss
from rollouts.training.seams import Tokenizer
from rollouts.worker.builders import StageName
from rollouts.worker.builders.loss import rl_loss
from rollouts.worker.builders.model import build_model, build_reference, build_value_head
from rollouts.worker.builders.optimizer import stage_optimizer


def stage_settings(config: Config, stage: StageName) -> SFTConfig | RLConfig:
    """Return the stage's own section; the plan starts no stage without one."""
    settings = config.sft if stage == "sft" else config.rl
    assert settings is not None, stage
    return settings


def build_backend(
    config: Config,
    stage: StageName,
    *,
    checkpoint_dir: Path,
    model_path: str,
    tokenizer: Tokenizer,
    device: torch.device,
    num_steps: int,
    reference: str | None,
    retention: Retention,
) -> PyTorchTrainingBackend:
    """Return the backend over the model at `model_path`. `num_steps`: optimizer steps, for the schedule."""
    settings = stage_settings(config, stage)
    optimizer = settings.optimizer
    model = build_model(config.model, model_path)
    factor = partial(
        lr_factor,
        total_steps=num_steps,
        warmup_frac=optimizer.warmup_frac,
        schedule=optimizer.schedule,
    )
    loss_fn = rl_loss(settings) if isinstance(settings, RLConfig) else sft_loss
    frozen = build_reference(config, model, reference) if reference else None
    if config.target.sharding != "none":
        return FSDPTrainingBackend(
            model,
            partial(stage_optimizer, stage=settings),
            loss_fn,
            checkpoint_dir,
            _fsdp_config(config),
            device=device,
            tokenizer=tokenizer,
            max_grad_norm=optimizer.max_grad_norm,
            lr_schedule=factor,
            reference=frozen,
            retention=retention,
        )
    return PyTorchTrainingBackend(
        model,
        stage_optimizer(model, settings),
        loss_fn,
        checkpoint_dir,
        device,
        tokenizer=tokenizer,
        max_grad_norm=optimizer.max_grad_norm,
        lr_schedule=factor,
        compute_dtype=config.model.dtype,
        reference=frozen,
        retention=retention,
        value_head=build_value_head(config, stage, model),
    )


def _fsdp_config(config: Config) -> FSDPConfig:
    target = config.target
    return FSDPConfig(
        sharding_strategy=target.sharding.upper(),
        mixed_precision=config.model.dtype == "bfloat16",
        cpu_offload=target.cpu_offload,
        shard_group_size=None if target.shard_group_size == -1 else target.shard_group_size,
    )


def build_retention(config: Config, run: RunDir, stage: StageName) -> Retention:
    """Return which checkpoints of the stage stay. Each removal is an event, so that no laptop waits to pull it."""
    mode, _, metric = config.output.checkpoint_best.get(stage, "min ").partition(" ")

    def on_remove(path: Path) -> None:
        append_event(run, "checkpoint_removed", stage=stage, path=str(path.relative_to(run.path)))

    return Retention(
        keep_last=config.output.checkpoints_keep,
        best_metric=metric or None,
        best_mode="max" if mode == "max" else "min",
        on_remove=on_remove,
    )
