"""From the job's config to the library's objects: model, optimizer, loss, reference, backend. Nothing trains here."""

import contextlib
import dataclasses
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rollouts.config import (
    GRPO,
    AgentConfig,
    BroadcastSync,
    Config,
    DiskSync,
    EngineConfig,
    LoraSync,
    ModelConfig,
    RLConfig,
    SFTConfig,
    ValueModel,
)
from rollouts.run_dir import RunDir, append_event
from rollouts.training.seams import Tokenizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from rollouts.agents.endpoint import Endpoint
    from rollouts.agents.episode import Limits
    from rollouts.training.backends.fsdp import FSDPConfig
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.checkpoint import Retention
    from rollouts.training.reference import Reference
    from rollouts.training.types import RLTrainingConfig
    from rollouts.training.value_head import ValueHead
    from rollouts.training.weight_sync import SGLangEngine
    from rollouts.training.weight_transfer.protocol import Transfer
    from rollouts.training.weight_transfer.sync import WeightSync


def reference_name(config: Config, stage: str, model_path: str, *, resumes: bool) -> str | None:
    """Where the frozen model of the KL penalty is loaded from; None without one.

    A resumed run keeps the reference it began with, which its checkpoint names: never the checkpoint itself.
    Raises CheckpointError for a checkpoint that was trained without one, where the config names none either.
    """
    from rollouts.training.checkpoint import CheckpointError, read_metadata

    rl = config.rl
    if stage != "rl" or rl is None or rl.kl is None:
        return None
    if rl.kl.reference is not None:
        return rl.kl.reference
    if not resumes:
        return model_path
    recorded = read_metadata(Path(model_path)).get("reference")
    if recorded is None:
        raise CheckpointError(
            f"{model_path}: was trained without a KL reference, and rl.kl.coef={rl.kl.coef} needs one: set "
            "rl.kl.reference to the model that run started from, or rl.kl=None"
        )
    return recorded["name"]


def base_model(config: Config, model_path: str, *, resumes: bool) -> str:
    """Where this stage's weights come from before its checkpoint is loaded.

    A checkpoint of a LoRA run holds merged weights: it goes on over the frozen ones, which it names.
    """
    from rollouts.training.lora import read_base

    base = read_base(Path(model_path)) if resumes and config.model.lora is not None else None
    return model_path if base is None else base["name"]


def generate_fn(rl: RLConfig, tokenizer: Tokenizer, engines: Sequence[Any], reward_fn: Any) -> Callable[..., Any]:
    """What samples a group: single answers, or an agent's episodes. Rewards that wait for something, or updates that
    find groups at different points, want each group to come back by itself.
    """
    from rollouts.training.agent_integration import make_agent_generate_fn
    from rollouts.training.rollout_gen.engine_generate import make_generate_fn

    if rl.agent is None:
        drawn: dict[str, Any] = {"max_new_tokens": rl.max_new_tokens, "temperature": rl.temperature, "top_k": rl.top_k}
        apart = (
            rl.in_flight_updates
            or (rl.reward is not None and rl.reward.workers > 0)
            or inspect.iscoroutinefunction(reward_fn)
        )
        return make_generate_fn(engines, tokenizer, **drawn, apart=apart)
    endpoints, environment, limits = agent_parts(rl, tokenizer, engines)
    return make_agent_generate_fn(endpoints, environment, limits=limits)


def agent_parts(
    rl: RLConfig, tokenizer: Tokenizer, engines: Sequence[Any]
) -> tuple[list["Endpoint"], Callable[..., Any], "Limits"]:
    """An agent job's endpoints, one per engine, what makes its environment, and the limits of an episode."""
    from rollouts.agents.endpoint import Endpoint
    from rollouts.agents.episode import Limits
    from rollouts.training.rewards import resolve

    agent = cast(AgentConfig, rl.agent)
    endpoints = [
        Endpoint(
            engine=engine,
            tokenizer=tokenizer,
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
            top_k=rl.top_k,
            tool_format=agent.tool_format,
        )
        for engine in engines
    ]
    limits = Limits(turns_max=agent.turns_max, tokens_max=agent.tokens_max, timeout_s=agent.timeout_s)
    return endpoints, resolve(agent.environment), limits


def rl_training_config(rl: RLConfig, num_steps: int) -> "RLTrainingConfig":
    from rollouts.training.types import RLTrainingConfig

    value = rl.baseline if isinstance(rl.baseline, ValueModel) else None
    gae = {"gamma": value.gamma, "gae_lambda": value.gae_lambda} if value is not None else {}
    return RLTrainingConfig(
        num_steps=num_steps,
        sync_every=rl.sampling.sync_every,
        policy_lag_steps_max=rl.policy_lag_steps_max,
        in_flight_updates=rl.in_flight_updates,
        baseline="value" if isinstance(rl.baseline, ValueModel) else rl.baseline,
        log_every=rl.log_every,
        checkpoint_every=rl.save_every,
        advantage_norm=rl.loss.advantage_norm,
        micro_batch_size=rl.batch_size,
        micro_batch_tokens=None if rl.micro_batch_tokens == -1 else rl.micro_batch_tokens,
        updates_per_batch=rl.loss.updates_per_batch,
        **gae,
    )


def rl_loss(rl: RLConfig) -> Callable[..., Any]:
    """The loss that the config describes: a function of logits and a batch's keys."""
    from rollouts.training.rl_losses import policy_loss

    loss, options = rl.loss, dict[str, Any]()
    if not isinstance(loss, GRPO):
        options |= {"clip_range": (loss.clip_low, loss.clip_high), "dual_clip": loss.dual_clip}
    elif loss.importance is not None:
        options |= {"importance": loss.importance.kind, "importance_cap": loss.importance.cap}
    if rl.kl is not None:
        options |= {"kl_coef": rl.kl.coef, "kl_kind": rl.kl.kind}
    if isinstance(rl.baseline, ValueModel):
        options |= {"value_coef": rl.baseline.coef, "value_clip": rl.baseline.clip}
    return partial(
        policy_loss,
        loss=loss.kind,
        aggregation=loss.aggregation,
        length_norm=rl.max_new_tokens,
        entropy_coef=loss.entropy_coef,
        **options,
    )


def retention(config: Config, run: RunDir, stage: str) -> "Retention":
    """Which checkpoints of the stage stay; the removal of the others is an event, so that nobody waits to pull them."""
    from rollouts.training.checkpoint import Retention

    mode, _, metric = config.output.checkpoint_best.get(stage, "min ").partition(" ")

    def on_remove(path: Path) -> None:
        append_event(run, "checkpoint_removed", stage=stage, path=str(path.relative_to(run.path)))

    return Retention(
        keep_last=config.output.checkpoints_keep,
        best_metric=metric or None,
        best_mode=cast(Literal["min", "max"], mode),
        on_remove=on_remove,
    )


def value_head(config: Config, stage: str, model: Any) -> "ValueHead | None":
    """The value model that rl.baseline asks for; None without."""
    from rollouts.training.value_head import ValueHead

    rl = config.rl
    if stage != "rl" or rl is None or not isinstance(rl.baseline, ValueModel):
        return None
    optimizer = rl.optimizer
    width = model.config.get_text_config().hidden_size
    return ValueHead(width, lr=rl.baseline.lr, beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps)


def build_model(model: ModelConfig, path: str) -> Any:
    """The model that is trained, on the CPU: the one at `path`, as the config wants it wrapped."""
    from rollouts.training.compiled_layers import compile_layers
    from rollouts.training.lora import LoraSettings, apply_lora
    from rollouts.training.model_loading import enable_activation_checkpointing, load_model

    init = model.init if path == model.name else "pretrained"
    built = load_model(path, init=init, init_seed=model.init_seed, trust_remote_code=model.trust_remote_code)
    if model.lora is not None:
        apply_lora(built, LoraSettings(**dataclasses.asdict(model.lora)), base_name=path)
    if model.activation_checkpointing:
        enable_activation_checkpointing(built)
    if model.compile:
        compile_layers(built)
    return built


def stage_optimizer(model: Any, stage: SFTConfig | RLConfig) -> "Optimizer":
    """The optimizer that a stage's config describes, for `model`'s trainable parameters."""
    from rollouts.training.optim import MuonSettings, build_optimizer

    settings, muon = stage.optimizer, None
    if settings.muon is not None:
        width = settings.muon.width_reference
        constants = dataclasses.asdict(settings.muon)
        muon = MuonSettings(**{**constants, "width_reference": None if width == -1 else width})
        muon = dataclasses.replace(muon, vector_lr=muon.vector_lr * stage.init_lr_frac)
    return build_optimizer(
        model,
        kind=settings.kind,
        matrix_lr=stage.matrix_lr * stage.init_lr_frac,
        embedding_lr=stage.embedding_lr * stage.init_lr_frac,
        unembedding_lr=stage.unembedding_lr * stage.init_lr_frac,
        weight_decay=stage.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        muon=muon,
    )


def stage_reference(config: Config, model: Any, name: str) -> "Reference":
    """The frozen model of the KL penalty: `model`'s own frozen weights if these are it, with LoRA; else loaded.

    A sharded model cannot be its own reference: its adapters cannot be turned off and on.
    """
    from rollouts.training.lora import base_as_reference, base_record, is_lora
    from rollouts.training.reference import load_reference

    if config.target.sharding == "none" and is_lora(model) and base_record(model)["name"] == name:
        return base_as_reference(model)
    return load_reference(name, trust_remote_code=config.model.trust_remote_code)


def build_backend(
    config: Config,
    stage: str,
    *,
    checkpoint_dir: Path,
    model_path: str,
    tokenizer: Tokenizer,
    device: Any,
    num_steps: int,
    reference: str | None,
    retention: "Retention",
) -> "PyTorchTrainingBackend":
    from rollouts.training.backends.fsdp import FSDPTrainingBackend
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.optim import lr_factor
    from rollouts.training.rl_losses import sft_loss

    settings = cast(SFTConfig | RLConfig, getattr(config, stage))
    optimizer = settings.optimizer
    model = build_model(config.model, model_path)
    factor = partial(lr_factor, total_steps=num_steps, warmup_frac=optimizer.warmup_frac, schedule=optimizer.schedule)
    options: dict[str, Any] = {
        "loss_fn": rl_loss(cast(RLConfig, config.rl)) if stage == "rl" else sft_loss,
        "checkpoint_dir": checkpoint_dir,
        "device": device,
        "tokenizer": tokenizer,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_schedule": factor,
        "reference": stage_reference(config, model, reference) if reference else None,
        "retention": retention,
    }
    if config.target.sharding != "none":
        return FSDPTrainingBackend(
            model, partial(stage_optimizer, stage=settings), config=fsdp_config(config), **options
        )
    return PyTorchTrainingBackend(
        model,
        stage_optimizer(model, settings),
        compute_dtype=config.model.dtype,
        value_head=value_head(config, stage, model),
        **options,
    )


@contextlib.asynccontextmanager
async def weight_sync(
    config: Config, run: RunDir, backend: "PyTorchTrainingBackend", engines: Sequence["SGLangEngine"]
) -> AsyncIterator["WeightSync | None"]:
    """How the trainer's weights reach the engines; None where nothing samples. What it made is removed at the end."""
    import anyio

    from rollouts.training.weight_transfer.sync import WeightSync

    if not config.uses_engine or config.engine is None:
        yield None
        return
    transfer = weight_transfer(config, run, backend)
    sleeps = config.engine.sleep_while_training
    sync = WeightSync(backend, engines, transfer, dtype=config.model.dtype, sleep_while_training=sleeps)
    try:
        yield sync
    finally:
        with anyio.CancelScope(shield=True):
            await sync.aclose()


def weight_transfer(config: Config, run: RunDir, backend: "PyTorchTrainingBackend") -> "Transfer":
    """The transfer that engine.weight_sync names. Weights travel in the engines' dtype."""
    import torch

    from rollouts.training.weight_transfer.adapter import AdapterTransfer
    from rollouts.training.weight_transfer.broadcast import BroadcastLink
    from rollouts.training.weight_transfer.buckets import BucketTransfer
    from rollouts.training.weight_transfer.disk import DiskTransfer
    from rollouts.training.weight_transfer.tensor import SharedMemoryLink

    engine = cast(EngineConfig, config.engine)
    dtype = None if config.model.dtype == "float32" else getattr(torch, config.model.dtype)
    settings = engine.weight_sync
    if isinstance(settings, DiskSync | LoraSync):
        directory = run.weights_in_memory if settings.on_tmpfs else run.weights
        kind = AdapterTransfer if isinstance(settings, LoraSync) else DiskTransfer
        return kind(backend, directory, dtype=dtype, temporary=settings.on_tmpfs)
    readers = engine.tensor_parallel_size
    link: Any = SharedMemoryLink(tensor_parallel_size=readers, owner=f"{run.memory_name}-")
    if isinstance(settings, BroadcastSync):
        timeout_s = config.limits.sample_timeout_s
        link = BroadcastLink(device_type=config.target.device_type, tensor_parallel_size=readers, timeout_s=timeout_s)
    rl = cast(RLConfig, config.rl)
    steps_meanwhile = rl.policy_lag_steps_max > 0 or rl.sampling.sync_every != 1
    keep = engine.restarts_max > 0 and (steps_meanwhile or config.target.sharding != "none")
    return BucketTransfer(backend, link, dtype=dtype, bucket_bytes=settings.bucket_mib * 2**20, keep=keep)


def fsdp_config(config: Config) -> "FSDPConfig":
    """How the model is sharded, where `target.sharding` says that it is."""
    from rollouts.training.backends.fsdp import FSDPConfig

    target = config.target
    return FSDPConfig(
        sharding_strategy=target.sharding.upper(),
        mixed_precision=config.model.dtype == "bfloat16",
        cpu_offload=target.cpu_offload,
        shard_group_size=None if target.shard_group_size == -1 else target.shard_group_size,
    )
