"""A first config for a model, data and a reward: every field decided here, from a few choices. Pure.

`deploy new` writes the result as a file that spells out every field; nothing is filled in later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rollouts.config.families import family_of
from rollouts.config.field_types import ConfigError
from rollouts.config.job import Config
from rollouts.config.schema import (
    GRPO,
    DataConfig,
    DatasetSpec,
    DiskSync,
    Embedded,
    EngineConfig,
    EvalConfig,
    HostConfig,
    LimitsConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    SFTConfig,
    SGLang,
    TargetConfig,
)

SEED = 42
PORT = 30180
HELD_OUT_MAX = 200  # rows of the training file's end that are held out, a twentieth of it at most
STEPS_MIN = 20  # an epoch has at least so many optimizer steps, as far as the rows allow
GIB_PER_BILLION = 2.0  # of weights in bfloat16
ENGINE_SHARE = 0.85  # of a card that an engine has for itself
# Learning rates to start from: full fine-tuning by size, LoRA about ten times as much
RATES = {"sft": ((1.0, 2e-5), (9.0, 1e-5), (100.0, 5e-6)), "rl": ((9.0, 1e-6), (100.0, 5e-7))}
# of random weights
RATES_FROM_SCRATCH = {"sft": ((0.01, 3e-3), (100.0, 3e-4)), "rl": ((0.01, 5e-4), (100.0, 1e-5))}
LORA_FACTOR = 10.0


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """A data set to train on, and how many rows it has."""

    name: str  # a .jsonl file or a hub id
    format: str
    split: str
    subset: str | None
    rows: int | None  # None: unknown
    test_split: str | None  # of the hub's data set; None: the end of `split` is held out


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A model, and what is known of it."""

    name: str  # hub id, or a directory
    parameters: int | None  # None: unknown
    has_weights: bool  # False: a directory of architecture and tokenizer alone
    config: Mapping[str, Any] | None = None  # of a directory here: its config.json

    @property
    def billions(self) -> float:
        """Parameters in billions; an unknown model counts as 1."""
        return 1.0 if self.parameters is None else self.parameters / 1e9


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What `deploy new` is told."""

    experiment_name: str
    mode: Literal["sft", "rl", "sft+rl"]
    model: ModelChoice
    sft_data: DataChoice | None
    rl_data: DataChoice | None
    reward: str | None  # dotted name; None without an rl stage
    gpus: int  # 0: the CPU
    gpu_memory_gib: float
    lora: bool
    colocated: bool  # trainer and engine share all GPUs
    max_length: int  # tokens
    max_new_tokens: int
    package_files: str  # what paths of requirements/ begin with


def scaffold(choices: Choices) -> Config:
    """Return a whole config for these choices. Raises ConfigError where no layout of the GPUs can hold the model."""
    trainers, engine = _layout(choices)
    on_gpu, prefix = choices.gpus > 0, choices.package_files
    family = family_of(choices.model.name)
    return Config(
        target=TargetConfig(
            hosts=1,
            hosts_min=1,
            gpu_ranks=trainers,
            device_type="cuda" if on_gpu else "cpu",
            sharding="full_shard" if len(trainers) > 1 else "none",
            shard_group_size=-1,
            cpu_offload=False,
        ),
        host=HostConfig(
            installer="uv" if on_gpu else "pip",
            requirements=[],
            constraints_file=f"{prefix}requirements/{'trainer-cuda' if on_gpu else 'constraints'}.txt",
            torch_build="auto",
            env={"TOKENIZERS_PARALLELISM": "false"},
            secrets=["HF_TOKEN"] if family is not None and family.is_gated else [],
            disk_free_gib_min=_disk_gib(choices),
            threads_per_process=4 if on_gpu else 1,
        ),
        model=ModelConfig(
            name=choices.model.name,
            init="pretrained" if choices.model.has_weights else "random",
            init_seed=SEED,
            dtype="bfloat16" if on_gpu else "float32",
            compile=False,
            activation_checkpointing=False,
            lora=_lora() if choices.lora else None,
            trust_remote_code=False,
        ),
        data=_data(choices),
        sft=_sft(choices) if "sft" in choices.mode else None,
        rl=_rl(choices) if "rl" in choices.mode else None,
        eval=EvalConfig(
            num_samples=0,
            pass_at=[],
            temperature=1.0,
            top_k=-1,
            seed=SEED,
            in_process_rows=100,
            in_process_new_tokens=min(512, choices.max_length),
            in_process_batch_tokens=65_536,
        ),
        engine=engine,
        limits=LimitsConfig(
            bootstrap_timeout_s=3600.0,
            engine_ready_timeout_s=1200.0,
            stage_timeout_s=24 * 3600.0,
            engine_hang_timeout_s=60.0,
            sample_timeout_s=600.0,
            reward_timeout_s=30.0,
            stop_grace_s=30.0,
            restarts_max=0,
        ),
        output=_output(choices),
        provision=None,
    )


def _output(choices: Choices) -> OutputConfig:
    return OutputConfig(
        save_dir="runs",
        log_level="INFO",
        experiment_name=choices.experiment_name,
        use_wandb=False,
        wandb_project="",
        trackers=[],
        mode=choices.mode,
        source_checkpoint=None,
        checkpoints_keep=2,
        checkpoint_best={},
        on_end=None,
        on_warning=None,
    )


def _layout(choices: Choices) -> tuple[list[int], EngineConfig | None]:
    """Return the trainer's GPUs, and the engine on the others or, colocated, on the same."""
    gpus = list(range(choices.gpus))
    if choices.mode == "sft":
        return gpus or [0], None
    shared = {"sglang_port": PORT, "context_length": choices.max_length, "restarts_max": 3}
    if not gpus:
        sync, rows = DiskSync(on_tmpfs=False), 256
        return [0], Embedded(
            hosts=None,
            requirements_file=None,
            gpu_ranks=[0],
            replicas=1,
            mem_fraction=0.5,
            max_running_requests=rows,
            weight_sync=sync,
            **shared,
        )
    trainers, engines = (
        (gpus, gpus) if choices.colocated else (gpus[: len(gpus) // 2], gpus[len(gpus) // 2 :])
    )
    alone = not choices.colocated
    size = _tensor_parallel(choices, len(engines))
    replicas = len(engines) // size
    return trainers, SGLang(
        hosts=None,
        requirements_file=f"{choices.package_files}requirements/sglang-cuda.txt",
        gpu_ranks=engines[: replicas * size],
        replicas=replicas,
        router_port=PORT + 10 if replicas > 1 else None,
        tensor_parallel_size=size,
        mem_fraction=ENGINE_SHARE if alone else 0.5,
        max_total_tokens=None,
        max_running_requests=256,
        weight_sync=DiskSync(on_tmpfs=True),
        sleep_while_training=not alone,
        **shared,
    )


def _tensor_parallel(choices: Choices, engines: int) -> int:
    """Return over how many GPUs a replica is spread: the fewest on which weights leave half of its part for the cache.

    Raises ConfigError where all of them are too few.
    """
    weights = GIB_PER_BILLION * choices.model.billions
    for size in (1, 2, 4, 8):
        if size <= engines and weights / size <= 0.5 * ENGINE_SHARE * choices.gpu_memory_gib:
            return size
    raise ConfigError(
        f"{choices.model.name}: its weights take {weights:.0f} GiB, and the engine has {engines} GPU(s) of"
        f" {choices.gpu_memory_gib:g} GiB. Give --gpus a larger number, or choose a smaller model."
    )


def _disk_gib(choices: Choices) -> float:
    """Return room for environments, the model and three checkpoints with optimizer state (16 bytes a parameter)."""
    billions = choices.model.billions
    kept = 3 * (2 if choices.lora else 16) * billions
    return float(round((40 if choices.gpus else 5) + 3 * billions + kept))


def _lora() -> LoraConfig:
    return LoraConfig(rank=32, alpha=64.0, dropout=0.0, target_modules="all-linear", init_seed=SEED)


def _data(choices: Choices) -> DataConfig:
    sft, rl = choices.sft_data, choices.rl_data
    held = rl or sft
    assert held is not None, "a stage has data"
    return DataConfig(
        sft_mixture=[_train(sft)] if sft else [],
        sft_order="shuffled",
        rl_mixture=[_train(rl)] if rl else [],
        eval_mixture=[_held_out(held)] if _holds_out(choices) else [],
        max_length=choices.max_length,
        shuffle_seed=SEED,
    )


def _held_rows(data: DataChoice) -> int:
    return min(HELD_OUT_MAX, (data.rows or 0) // 20)


def _holds_out(choices: Choices) -> bool:
    """Return whether rows are left for evaluation: a file of fewer than 20 rows is trained on whole."""
    data = choices.rl_data or choices.sft_data
    return data is not None and (data.test_split is not None or _held_rows(data) > 0)


def _train(data: DataChoice) -> DatasetSpec:
    held = 0 if data.test_split else _held_rows(data)
    return _spec(
        data, split=data.split, start=0, stop=data.rows - held if held and data.rows else -1
    )


def _held_out(data: DataChoice) -> DatasetSpec:
    if data.test_split:
        return _spec(data, split=data.test_split, start=0, stop=-1)
    return _spec(data, split=data.split, start=(data.rows or 0) - _held_rows(data), stop=-1)


def _spec(data: DataChoice, *, split: str, start: int, stop: int) -> DatasetSpec:
    """Return rows shuffled by one seed, so that the slices that train and that are held out share none."""
    return DatasetSpec(
        name=data.name,
        format=data.format,
        split=split,
        subset=data.subset,
        shuffle_seed=SEED,
        start=start,
        stop=stop,
        step=1,
        max_samples=HELD_OUT_MAX if split == data.test_split else -1,
        streaming=False,
        repeat=1,
    )


def _examples(rows: int | None, most: int, ranks: int) -> int:
    """Return examples a step: a power of two from the number of ranks to `most`, that leaves STEPS_MIN steps."""
    least = 1 << (ranks - 1).bit_length()
    examples = most
    while examples > max(least, 4) and rows is not None and rows // examples < STEPS_MIN:
        examples //= 2
    return examples


def _rate(stage: Literal["sft", "rl"], choices: Choices) -> float:
    billions = choices.model.billions
    rates = RATES if choices.model.has_weights else RATES_FROM_SCRATCH
    rate = next(rate for most, rate in rates[stage] if billions <= most)
    return rate * LORA_FACTOR if choices.lora else rate


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(
        muon=None,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
        warmup_frac=0.05,
        schedule="linear",
    )


def _micro_batch_tokens(choices: Choices) -> int:
    return max(choices.max_length, 16_384 if choices.gpus else 4096)


def _sft(choices: Choices) -> SFTConfig:
    rows = choices.sft_data.rows if choices.sft_data else None
    rate = _rate("sft", choices)
    table_rate = 0.0 if choices.lora else rate
    return SFTConfig(
        num_epochs=1 if rows is None or rows >= 5000 else 3,
        num_iterations=-1,
        batch_size=4,
        micro_batch_tokens=_micro_batch_tokens(choices),
        target_examples_per_step=_examples(rows, 128, max(1, choices.gpus)),
        unembedding_lr=table_rate,
        embedding_lr=table_rate,
        matrix_lr=rate,
        weight_decay=0.0,
        init_lr_frac=1.0,
        eval_every=50 if _holds_out(choices) else -1,
        eval_steps=-1,
        checkpoint_every=200,
        log_every=1,
        optimizer=_optimizer(),
    )


def _rl(choices: Choices) -> RLConfig:
    rows = choices.rl_data.rows if choices.rl_data else None
    rate = _rate("rl", choices)
    table_rate = 0.0 if choices.lora else rate
    return RLConfig(
        num_epochs=1 if rows is None or rows >= 5000 else 3,
        examples_per_step=_examples(rows, 64, max(1, choices.gpus)),
        num_samples=8,
        batch_size=8,
        micro_batch_tokens=_micro_batch_tokens(choices),
        max_new_tokens=choices.max_new_tokens,
        temperature=1.0,
        top_k=-1,
        unembedding_lr=table_rate,
        embedding_lr=table_rate,
        matrix_lr=rate,
        weight_decay=0.0,
        init_lr_frac=1.0,
        optimizer=_optimizer(),
        eval_every=25 if _holds_out(choices) else -1,
        eval_examples=HELD_OUT_MAX,
        save_every=50,
        log_every=1,
        baseline="group_mean",
        loss=GRPO(
            advantage_norm="group_std", aggregation="token_mean", entropy_coef=0.0, importance=None
        ),
        kl=None,
        reward=RewardConfig(fn=choices.reward or "", workers=4 if choices.gpus else 0),
        agent=None,
        sampling=SamplingConfig(
            source="engine",
            seed=SEED,
            sync_every=1,
            filter_fn=None,
            over_sampling_factor=1.0,
            retries_max=0,
        ),
        ahead=None,
    )
