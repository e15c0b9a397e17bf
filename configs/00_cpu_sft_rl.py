"""Offline, two CPU cores, minutes: a tiny Qwen2 learns to reverse 3 to 6 letters, first by SFT, then by GRPO.

SFT stops early on purpose, at about half of the held-out answers right; RL brings it to nearly all of them. Start here:

    deploy configs/00_cpu_sft_rl.py
"""

from base_config import (
    GRPO,
    Config,
    DataConfig,
    DatasetSpec,
    DiskSync,
    Embedded,
    EvalConfig,
    HostConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    SFTConfig,
    TargetConfig,
)

SEED = 0  # of the model's weights, the order of the data, and sampling


def letters(name: str, split: str) -> DatasetSpec:
    """One file of the task; scripts/make_letters_data.py made it. Train and test share no string."""
    return DatasetSpec(
        name=f"configs/data/letters/{name}.jsonl",
        format="question_answer",
        split=split,
        subset=None,
        shuffle_seed=None,
        start=0,
        stop=-1,
        step=1,
        max_samples=-1,
        streaming=False,
        repeat=1,
    )


def adamw(*, warmup_frac: float) -> OptimizerConfig:
    return OptimizerConfig(
        muon=None,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
        warmup_frac=warmup_frac,
        schedule="constant",
    )


config = Config(
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
        torch_build="auto",
        env={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        secrets=[],
        disk_free_gib_min=5.0,
        threads_per_process=1,
    ),
    model=ModelConfig(
        name="configs/models/tiny_qwen2",
        init="random",
        init_seed=SEED,
        dtype="float32",
        compile=False,
        activation_checkpointing=False,
        lora=None,
        trust_remote_code=False,
    ),
    data=DataConfig(
        sft_mixture=[letters("train_sft", "train")],
        sft_order="shuffled",
        rl_mixture=[letters("train_rl", "train")],
        eval_mixture=[letters("test", "test")],
        max_length=32,
        shuffle_seed=SEED,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=52,
        batch_size=128,
        micro_batch_tokens=-1,
        target_examples_per_step=128,
        unembedding_lr=3e-3,
        embedding_lr=3e-3,
        matrix_lr=3e-3,
        weight_decay=0.0,
        init_lr_frac=1.0,
        eval_every=26,
        eval_steps=-1,
        checkpoint_every=-1,
        log_every=5,
        optimizer=adamw(warmup_frac=0.1),
    ),
    rl=RLConfig(
        num_epochs=2,  # of 4,800 prompts: 300 steps
        examples_per_step=32,  # many prompts of few samples: 16 x 16 costs the same and learns half as fast
        num_samples=8,
        batch_size=256,
        micro_batch_tokens=-1,
        max_new_tokens=8,
        temperature=1.0,
        top_k=-1,
        unembedding_lr=5e-4,
        embedding_lr=5e-4,
        matrix_lr=5e-4,
        weight_decay=0.0,
        init_lr_frac=1.0,
        optimizer=adamw(warmup_frac=0.0),
        eval_every=50,
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
        reward=RewardConfig(fn="rollouts.training.rewards.per_letter_and_exact", workers=0),
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
    ),
    eval=EvalConfig(
        num_samples=0,
        pass_at=[],
        temperature=1.0,
        top_k=-1,
        seed=SEED,
        in_process_rows=500,
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
        max_running_requests=512,
        weight_sync=DiskSync(on_tmpfs=False),
        restarts_max=3,
    ),
    limits=LimitsConfig(
        bootstrap_timeout_s=1800.0,
        engine_ready_timeout_s=120.0,
        stage_timeout_s=1800.0,
        engine_hang_timeout_s=60.0,
        sample_timeout_s=120.0,
        reward_timeout_s=30.0,
        stop_grace_s=10.0,
        restarts_max=0,
    ),
    output=OutputConfig(
        save_dir="runs",
        log_level="INFO",
        experiment_name="cpu_sft_rl",
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
