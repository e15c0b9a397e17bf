"""What each GPU of a job holds in each stage, at its fullest moment. Pure: config + shapes + cards → uses.

What is not known is named in `Use.unknown`, and the sum is then the least that is needed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rollouts.config import BroadcastSync, Config, RLConfig, SFTConfig, TensorSync
from rollouts.config.answer_limits import answer_limits
from rollouts.remote.inputs.shapes import Shape
from rollouts.remote.plan.memory.engine_memory import (
    CARD_BYTES_UNKNOWN,
    CONTEXT_BYTES,
    GIB,
    Card,
    EngineUse,
    engine_parts,
    engine_uses,
)
from rollouts.remote.plan.memory.training_memory import (
    MASTER,
    Adapters,
    Parts,
    StepLoad,
    answering_peak,
    at_rest,
    head_chunk,
    linears,
    training_peaks,
)

Stage = Literal["sft", "rl"]
FRAGMENTS_SHARE = 20  # 1/20 of what torch's allocator holds is lost to fragments
NCCL_BYTES = GIB // 4  # buffers of the communicators between ranks


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a run. A text in place of a shape says why it is not known."""

    policy: Shape | str
    reference: Shape | str | None  # None: the run has no KL penalty
    parameters: int | None  # of the policy, where they were counted in its files


@dataclass(frozen=True, kw_only=True)
class Use:
    """One GPU in one stage."""

    gpu: int
    stage: Stage
    moment: str  # when it is fullest
    parts: Parts
    unknown: tuple[str, ...]
    engines: tuple[EngineUse, ...]

    @property
    def needed(self) -> int:
        return sum(self.parts.values())


def gpu_uses(config: Config, models: Models, cards: Mapping[int, Card]) -> Iterator[Use]:
    """Return every use, GPU by GPU, of those in `cards`."""
    for stage in config.stages:
        engine = config.engine if stage == "rl" and config.uses_engine else None
        for gpu in sorted(
            {*_trainer_ranks(config, stage), *(engine.gpu_ranks if engine else ())} & {*cards}
        ):
            yield _use(config, stage, models, gpu, cards[gpu])


def _trainer_ranks(config: Config, stage: Stage) -> list[int]:
    """Return the GPUs that hold a trainer in the stage: none where samples are only collected."""
    collects = (
        stage == "rl" and config.rl is not None and config.rl.sampling.source == "engine_only"
    )
    return [] if collects else config.target.gpu_ranks


def _use(config: Config, stage: Stage, models: Models, gpu: int, card: Card) -> Use:
    unknown: list[str] = []
    found: list[EngineUse] = []
    engine = config.engine if stage == "rl" and config.uses_engine else None
    trains = gpu in _trainer_ranks(config, stage)
    if engine is not None and gpu in engine.gpu_ranks:
        if isinstance(models.policy, Shape):
            found = engine_uses(config, engine, models.policy, gpu, card)
        else:
            unknown.append(f"the engine's weights ({models.policy})")
    moments: dict[str, Parts] = (
        dict(_trainer_moments(config, stage, models, card, unknown)) if trains else {}
    )
    sleeps = engine is not None and engine.sleep_while_training and bool(moments)
    awake = engine_parts(found, asleep=False) if found else {}
    asleep = engine_parts(found, asleep=True) if found else {}
    combined: dict[str, Parts] = {
        name: {**parts, **(asleep if sleeps else awake)} for name, parts in moments.items()
    }
    if sleeps and isinstance(models.policy, Shape):
        combined["sampling"] = {**_resting(config, stage, models, card), **awake}
    combined = combined or {"sampling": awake}
    moment = max(combined, key=lambda name: sum(combined[name].values()))
    return Use(
        gpu=gpu,
        stage=stage,
        moment=moment,
        parts=combined[moment],
        unknown=tuple(dict.fromkeys(unknown)),
        engines=tuple(found),
    )


# --- the trainer ----------------------------------------------------------------------------------------------------


def _trainer_moments(
    config: Config, stage: Stage, models: Models, card: Card, unknown: list[str]
) -> Iterator[tuple[str, Parts]]:
    """Return what a trainer's rank holds at each moment that may be its peak; to `unknown` goes what is not counted."""
    shape = models.policy
    if isinstance(shape, str):
        unknown.append(
            f"activations ({shape})" if models.parameters else f"the trainer's part ({shape})"
        )
        if models.parameters:
            yield (
                "at rest",
                _with_overhead(config, _counted_at_rest(config, stage, models.parameters)),
            )
        return
    step = step_of(config, stage, shape, card)
    reference = _reference_bytes(config, stage, models, step, unknown)
    if not shape.has_known_activations:
        unknown.append(f"activations (those of model_type={shape.kind!r} are not counted here)")
        peaks: dict[str, Parts] = {
            "training": {**at_rest(shape, step), "head": 2 * step.width * head_chunk(shape, step)}
        }
    else:
        peaks = {f"training: {name}": parts for name, parts in training_peaks(shape, step).items()}
        limits = answer_limits(config, stage)
        if limits is not None:
            # in RL the answer is of the longest, too
            new, longest = limits.new_tokens, config.data.max_length
            prompt = max(1, longest - new) if config.rl is not None else longest
            sizes = {"rows_max": limits.batch_rows, "tokens_max": limits.batch_tokens}
            peaks["answering held-out rows"] = answering_peak(
                shape, step, prompt=prompt, new=new, **sizes
            )
    for name, parts in peaks.items():
        yield (
            name,
            _with_overhead(config, {**parts, **({"reference": reference} if reference else {})}),
        )


def _with_overhead(config: Config, parts: Parts) -> Parts:
    """Add what torch's allocator and CUDA take beside tensors."""
    nccl = NCCL_BYTES if config.target.world_size > 1 else 0
    return {**parts, "other": sum(parts.values()) // FRAGMENTS_SHARE + CONTEXT_BYTES + nccl}


def _resting(config: Config, stage: Stage, models: Models, card: Card) -> Parts:
    """Return what the trainer holds while the engine samples, and while weights are sent."""
    assert isinstance(models.policy, Shape)
    step = step_of(config, stage, models.policy, card)
    sync = config.engine.weight_sync if config.engine is not None else None
    more = {
        "reference": _reference_bytes(config, stage, models, step, []),
        "buckets": 2 * sync.bucket_mib * 2**20
        if isinstance(sync, TensorSync | BroadcastSync)
        else 0,
    }
    parts = {**at_rest(models.policy, step), "gradients": 0}
    return _with_overhead(
        config, {**parts, **{name: count for name, count in more.items() if count}}
    )


def step_of(config: Config, stage: Stage, shape: Shape, card: Card) -> StepLoad:
    """Return what the memory of a stage's training step depends on."""
    settings, target, model = _stage(config, stage), config.target, config.model
    tokens = largest_micro_batch(config, stage)
    lora = model.lora
    targets = (
        tuple(linears(shape))
        if lora and lora.target_modules == "all-linear"
        else lora.target_modules
        if lora
        else ()
    )
    names = tuple(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    return StepLoad(
        tokens=tokens,
        # RL: each prompt's beginning is a document beside its samples'. Prompts are taken for half of the tokens.
        attended=tokens + tokens // 2 if stage == "rl" else tokens,
        trained=tokens,
        width=2 if model.dtype == "bfloat16" else MASTER,
        checkpointing=model.activation_checkpointing,
        compiled=model.compile,
        adapters=Adapters(rank=lora.rank, targets=names, has_dropout=lora.dropout > 0)
        if lora
        else None,
        muon=settings.optimizer.kind == "muon",
        shards=_shards(config),
        is_sharded=target.sharding != "none",
        keeps_gathered=target.sharding == "shard_grad_op",
        offloads=target.cpu_offload and target.sharding != "none",
        card_bytes=card.total or CARD_BYTES_UNKNOWN,
    )


def _stage(config: Config, stage: Stage) -> SFTConfig | RLConfig:
    settings: SFTConfig | RLConfig | None = getattr(config, stage)
    assert settings is not None, f"a config with a stage {stage}"
    return settings


def longest_sequence(config: Config, stage: Stage) -> int:
    """Return the most tokens that one sequence of the stage may have."""
    if stage == "rl" and config.rl is not None:
        if config.rl.agent is not None:
            return config.rl.agent.tokens_max
        if config.engine is not None:
            return config.engine.context_length
    return config.data.max_length


def largest_micro_batch(config: Config, stage: Stage) -> int:
    """Return the tokens of a rank's largest micro-batch, with no prompt shared."""
    settings, longest = _stage(config, stage), longest_sequence(config, stage)
    if isinstance(settings, RLConfig):
        sequences = settings.examples_per_step * settings.num_samples
    else:
        sequences = settings.target_examples_per_step
    own = max(1, math.ceil(sequences / max(1, config.target.world_size)))
    if settings.micro_batch_tokens == -1:
        return min(settings.batch_size, own) * longest
    return min(max(settings.micro_batch_tokens, longest), own * longest)


def _shards(config: Config) -> int:
    target = config.target
    if target.sharding == "none":
        return 1
    hybrid = target.sharding == "hybrid_shard" and target.shard_group_size > 0
    return target.shard_group_size if hybrid else max(1, target.world_size)


def _reference_bytes(
    config: Config, stage: Stage, models: Models, step: StepLoad, unknown: list[str]
) -> int:
    """Return the bytes of the KL penalty's frozen model: in the dtype of computing, float32 where it is sharded."""
    rl = config.rl
    if stage != "rl" or rl is None or models.reference is None or _is_own_reference(config, rl):
        return 0
    if isinstance(models.reference, str):
        unknown.append(f"the reference model ({models.reference})")
        return 0
    if step.is_sharded:
        return 0 if step.offloads else MASTER * models.reference.parameters // step.shards
    return step.width * models.reference.parameters


def _is_own_reference(config: Config, rl: RLConfig) -> bool:
    """Return whether the reference is the policy with its adapters off."""
    alone = config.model.lora is not None and config.target.sharding == "none"
    from_the_start = (
        config.stages[0] == "rl" and rl.kl is not None and rl.kl.reference == config.model.name
    )
    return alone and rl.kl is not None and (rl.kl.reference is None or from_the_start)


def _counted_at_rest(config: Config, stage: Stage, count: int) -> Parts:
    """Return weights, gradients and state of a model of which the number of parameters alone is known: the least."""
    shards = _shards(config)
    if config.target.cpu_offload and config.target.sharding != "none":
        return {}
    copies = (
        2 * count if config.model.dtype == "bfloat16" and config.target.sharding == "none" else 0
    )
    parts = {"weights": MASTER * count // shards + copies}
    if config.model.lora is not None:
        return parts
    numbers = 1 if _stage(config, stage).optimizer.kind == "muon" else 2
    return {
        **parts,
        "gradients": MASTER * count // shards,
        "optimizer": numbers * MASTER * count // shards,
    }
