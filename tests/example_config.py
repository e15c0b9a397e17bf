"""A small valid config for tests, and a way to change one field by its path."""

import dataclasses
from typing import Any

from base_config import (
    GRPO,
    GSPO,
    PPO,
    AheadConfig,
    Config,
    DataConfig,
    DatasetSpec,
    DiskSync,
    Embedded,
    EvalConfig,
    HostConfig,
    ImportanceConfig,
    KLConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    SFTConfig,
    SGLang,
    TargetConfig,
    ValueModel,
)


def example_config() -> Config:
    spec = DatasetSpec(
        name="configs/data/letters/train_sft.jsonl",
        format="question_answer",
        split="train",
        subset=None,
        shuffle_seed=None,
        start=0,
        stop=-1,
        step=1,
        max_samples=-1,
        streaming=False,
        repeat=1,
    )
    optimizer = OptimizerConfig(
        muon=None,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
        warmup_frac=0.0,
        schedule="constant",
    )
    rates: dict[str, float] = {
        "unembedding_lr": 1e-3,
        "embedding_lr": 1e-3,
        "matrix_lr": 1e-3,
        "weight_decay": 0.0,
    }
    return Config(
        target=TargetConfig(
            hosts=1,
            hosts_min=1,
            gpu_ranks=[0],
            device_type="cpu",
            sharding="none",
            shard_group_size=-1,
            cpu_offload=False,
        ),
        host=HostConfig(
            installer="pip",
            requirements=[],
            constraints_file="requirements/constraints.txt",
            torch_build="index",
            env={"HF_HUB_OFFLINE": "1"},
            secrets=[],
            disk_free_gib_min=1.0,
            threads_per_process=1,
        ),
        model=ModelConfig(
            name="configs/models/tiny_qwen2",
            init="random",
            init_seed=0,
            dtype="float32",
            compile=False,
            activation_checkpointing=False,
            lora=None,
            trust_remote_code=False,
        ),
        data=DataConfig(
            sft_mixture=[spec],
            sft_order="shuffled",
            rl_mixture=[dataclasses.replace(spec, name="configs/data/letters/train_rl.jsonl")],
            eval_mixture=[
                dataclasses.replace(spec, name="configs/data/letters/test.jsonl", split="test")
            ],
            max_length=64,
            shuffle_seed=0,
        ),
        sft=SFTConfig(
            num_epochs=1,
            num_iterations=4,
            batch_size=8,
            micro_batch_tokens=-1,
            target_examples_per_step=16,
            **rates,
            init_lr_frac=1.0,
            eval_every=-1,
            eval_steps=-1,
            checkpoint_every=-1,
            log_every=1,
            optimizer=optimizer,
        ),
        rl=RLConfig(
            num_epochs=1,
            examples_per_step=4,
            num_samples=4,
            batch_size=16,
            micro_batch_tokens=-1,
            max_new_tokens=8,
            temperature=1.0,
            top_k=-1,
            **rates,
            init_lr_frac=1.0,
            optimizer=optimizer,
            eval_every=-1,
            eval_examples=-1,
            save_every=-1,
            log_every=1,
            baseline="group_mean",
            loss=GRPO(
                advantage_norm="group_std",
                aggregation="token_mean",
                entropy_coef=0.0,
                importance=None,
            ),
            kl=None,
            reward=RewardConfig(fn="rollouts.training.rewards.per_letter", workers=0),
            agent=None,
            sampling=SamplingConfig(
                source="engine",
                seed=0,
                sync_every=1,
                filter_fn=None,
                over_sampling_factor=1.0,
                retries_max=2,
            ),
            ahead=None,
        ),
        eval=EvalConfig(
            num_samples=0,
            pass_at=[],
            temperature=1.0,
            top_k=-1,
            seed=0,
            in_process_rows=-1,
            in_process_new_tokens=8,
            in_process_batch_tokens=131072,
        ),
        engine=Embedded(
            hosts=None,
            requirements_file=None,
            gpu_ranks=[0],
            sglang_port=30180,
            replicas=1,
            mem_fraction=0.5,
            context_length=2048,
            max_running_requests=256,
            weight_sync=DiskSync(on_tmpfs=False),
            restarts_max=0,
        ),
        limits=LimitsConfig(
            bootstrap_timeout_s=1800.0,
            engine_ready_timeout_s=120.0,
            stage_timeout_s=1800.0,
            engine_hang_timeout_s=60.0,
            sample_timeout_s=60.0,
            reward_timeout_s=30.0,
            stop_grace_s=5.0,
            restarts_max=0,
        ),
        output=OutputConfig(
            save_dir="runs",
            log_level="INFO",
            experiment_name="example",
            use_wandb=False,
            wandb_project="",
            trackers=[],
            mode="sft+rl",
            source_checkpoint=None,
            checkpoints_keep=-1,
            checkpoint_best={},
            on_end=None,
            on_warning=None,
        ),
        provision=None,
    )


def replace_at(value: Any, path: str, new: Any) -> Any:
    """`value` with the field or list item at `path`, such as "data.sft_mixture.0.repeat", replaced by `new`."""
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        index = int(head)
        return [
            *value[:index],
            replace_at(value[index], rest, new) if rest else new,
            *value[index + 1 :],
        ]
    inner = replace_at(getattr(value, head), rest, new) if rest else new
    return dataclasses.replace(value, **{head: inner})


def like_example(kind: type, whole: Any, **changes: Any) -> Any:
    """Return a `kind` with the fields that `whole` has too; `changes` give the others."""
    shared = {
        field.name: getattr(whole, field.name)
        for field in dataclasses.fields(kind)
        if hasattr(whole, field.name)
    }
    return kind(**{**shared, **changes})


def policy_loss(kind: type = PPO, **changes: Any) -> Any:
    """A loss like the example's: PPO, GSPO, CISPO, or GRPO itself."""
    clipped = {} if kind is GRPO else {"clip_low": 0.2, "clip_high": 0.2, "updates_per_batch": 1}
    clipped |= {"dual_clip": None} if kind in (PPO, GSPO) else {}
    rl = example_config().rl
    assert rl is not None
    return like_example(kind, rl.loss, **{**clipped, **changes})


def sglang(**changes: Any) -> SGLang:
    """An SGLang on a CPU, in the place of the example's engine."""
    own = {"requirements_file": "requirements/sglang-cpu.txt", "max_total_tokens": 4096}
    made = like_example(SGLang, example_config().engine, **{**own, **changes})
    assert isinstance(made, SGLang)
    return made


def value_model(**changes: Any) -> ValueModel:
    return ValueModel(
        **{"gamma": 1.0, "gae_lambda": 0.95, "coef": 0.5, "clip": None, "lr": 1e-3, **changes}
    )


def kl(**changes: Any) -> KLConfig:
    return KLConfig(**{"coef": 0.1, "kind": "k3", "reference": None, **changes})


def ahead(policy_lag_steps_max: int = 1, *, in_flight_updates: bool = False) -> AheadConfig:
    return AheadConfig(
        policy_lag_steps_max=policy_lag_steps_max, in_flight_updates=in_flight_updates
    )


def importance(kind: str = "token_truncate", cap: float = 2.0) -> ImportanceConfig:
    return ImportanceConfig(kind=kind, cap=cap)  # type: ignore[arg-type]  (tests try kinds that there are none of)
