"""A small valid config for tests, and a way to change one field by its path."""

import dataclasses
from typing import Any

from base_config import (
    Config,
    DataConfig,
    DatasetSpec,
    EngineConfig,
    EvalConfig,
    HostConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RLConfig,
    SFTConfig,
    TargetConfig,
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
        kind="adamw",
        muon=None,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
        warmup_frac=0.0,
        schedule="constant",
    )
    rates: dict[str, float] = {"unembedding_lr": 1e-3, "embedding_lr": 1e-3, "matrix_lr": 1e-3, "weight_decay": 0.0}
    return Config(
        target=TargetConfig(gpu_ranks=[0], device_type="cpu", sharding="none", shard_group_size=-1, cpu_offload=False),
        host=HostConfig(
            installer="pip",
            constraints_file="requirements/constraints.txt",
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
            eval_mixture=[dataclasses.replace(spec, name="configs/data/letters/test.jsonl", split="test")],
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
            source="engine",
            examples_per_step=4,
            num_samples=4,
            batch_size=16,
            micro_batch_tokens=-1,
            max_new_tokens=8,
            temperature=1.0,
            top_k=-1,
            **rates,
            init_lr_frac=1.0,
            eval_every=-1,
            eval_examples=-1,
            save_every=-1,
            log_every=1,
            baseline="group_mean",
            gamma=1.0,
            gae_lambda=0.95,
            value_coef=0.5,
            value_clip=-1.0,
            value_lr=1e-3,
            updates_per_batch=1,
            advantage_norm="group_std",
            loss="grpo",
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=-1.0,
            importance="none",
            importance_cap=2.0,
            aggregation="token_mean",
            kl_coef=0.0,
            kl_kind="k3",
            kl_reference=None,
            entropy_coef=0.0,
            reward_fn="rollouts.training.rewards.per_letter",
            filter_fn=None,
            over_sampling_factor=1.0,
            retries_max=2,
            sync_every=1,
            seed=0,
            optimizer=optimizer,
        ),
        eval=EvalConfig(num_samples=0, pass_at=[], temperature=1.0, top_k=-1, seed=0),
        engine=EngineConfig(
            kind="embedded",
            gpu_ranks=[0],
            sglang_port=30180,
            tensor_parallel_size=1,
            mem_fraction=0.5,
            max_running_requests=256,
        ),
        limits=LimitsConfig(
            bootstrap_timeout_s=1800.0,
            engine_ready_timeout_s=120.0,
            stage_timeout_s=1800.0,
            sample_timeout_s=60.0,
            stop_grace_s=5.0,
        ),
        output=OutputConfig(
            save_dir="runs",
            log_level="INFO",
            experiment_name="example",
            use_wandb=False,
            wandb_project="",
            mode="sft+rl",
            source_checkpoint=None,
            checkpoints_keep=-1,
            checkpoint_best={},
        ),
    )


def replace_at(value: Any, path: str, new: Any) -> Any:
    """`value` with the field or list item at `path`, such as "data.sft_mixture.0.repeat", replaced by `new`."""
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        index = int(head)
        return [*value[:index], replace_at(value[index], rest, new) if rest else new, *value[index + 1 :]]
    inner = replace_at(getattr(value, head), rest, new) if rest else new
    return dataclasses.replace(value, **{head: inner})
