"""GRPO on GSM8K with Qwen2.5-1.5B-Instruct: two GPUs train, two SGLang replicas sample on two others.

Generation runs one step ahead of training; samples of older weights are corrected by a truncated ratio. math-verify
judges the answers in processes of their own. Needs the hub and four GPUs of 24 GiB (docs/reference/gpu-hosts.md).

    deploy configs/rl_math.py --remote user@host --plan
"""

from base_config import (
    GRPO,
    AheadConfig,
    Config,
    DataConfig,
    DatasetSpec,
    DiskSync,
    EvalConfig,
    HostConfig,
    ImportanceConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    SGLang,
    TargetConfig,
)

SEED = 42


def gsm8k(split: str) -> DatasetSpec:
    """Word problems; the answer is a number."""
    return DatasetSpec(
        name="openai/gsm8k",
        format="gsm8k",
        split=split,
        subset="main",
        shuffle_seed=SEED,
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
        schedule="linear",
    )


config = Config(
    target=TargetConfig(
        hosts=1,
        hosts_min=1,
        gpu_ranks=[0, 1],
        device_type="cuda",
        sharding="full_shard",
        shard_group_size=-1,
        cpu_offload=False,
    ),
    host=HostConfig(
        installer="uv",
        requirements=[],
        constraints_file="requirements/trainer-cuda.txt",
        torch_build="auto",
        env={"TOKENIZERS_PARALLELISM": "false"},
        secrets=[],
        disk_free_gib_min=100.0,
        threads_per_process=4,
    ),
    model=ModelConfig(
        name="Qwen/Qwen2.5-1.5B-Instruct",
        init="pretrained",
        init_seed=SEED,
        dtype="bfloat16",
        compile=False,
        trust_remote_code=False,
        activation_checkpointing=True,
        lora=None,
    ),
    data=DataConfig(
        sft_mixture=[],
        sft_order="shuffled",
        rl_mixture=[gsm8k("train")],
        eval_mixture=[gsm8k("test")],
        max_length=2048,
        shuffle_seed=SEED,
    ),
    sft=None,
    rl=RLConfig(
        num_epochs=2,  # of 7,473 prompts: 232 steps
        examples_per_step=64,
        num_samples=8,
        batch_size=8,
        micro_batch_tokens=16_384,
        max_new_tokens=512,
        temperature=1.0,
        top_k=-1,
        unembedding_lr=1e-6,
        embedding_lr=1e-6,
        matrix_lr=1e-6,
        weight_decay=0.0,
        init_lr_frac=1.0,
        optimizer=adamw(warmup_frac=0.05),
        eval_every=40,
        eval_examples=400,
        save_every=80,
        log_every=1,
        baseline="group_mean",
        loss=GRPO(
            advantage_norm="group_std",
            aggregation="token_mean",
            entropy_coef=0.0,
            importance=ImportanceConfig(kind="token_truncate", cap=2.0),
        ),
        kl=None,
        reward=RewardConfig(fn="rollouts.training.rewards.math_verify", workers=4),
        agent=None,
        sampling=SamplingConfig(
            source="engine",
            seed=SEED,
            sync_every=1,
            filter_fn=None,
            over_sampling_factor=1.0,
            retries_max=0,
        ),
        ahead=AheadConfig(policy_lag_steps_max=1, in_flight_updates=False),
    ),
    eval=EvalConfig(
        num_samples=4,
        pass_at=[1, 4],
        temperature=1.0,
        top_k=-1,
        seed=SEED,
        in_process_rows=0,  # the engine answers
        in_process_new_tokens=512,
        in_process_batch_tokens=65536,
    ),
    engine=SGLang(
        hosts=None,
        requirements_file="requirements/sglang-cuda.txt",
        gpu_ranks=[2, 3],
        sglang_port=30180,
        replicas=2,
        router_port=30190,
        tensor_parallel_size=1,
        mem_fraction=0.85,
        context_length=2048,
        max_total_tokens=None,
        max_running_requests=256,
        weight_sync=DiskSync(on_tmpfs=True),
        sleep_while_training=False,
        restarts_max=4,
    ),
    limits=LimitsConfig(
        bootstrap_timeout_s=1800.0,
        engine_ready_timeout_s=1200.0,
        stage_timeout_s=6 * 3600.0,
        engine_hang_timeout_s=60.0,
        sample_timeout_s=600.0,
        reward_timeout_s=30.0,
        stop_grace_s=30.0,
        restarts_max=0,
    ),
    output=OutputConfig(
        save_dir="runs",
        log_level="INFO",
        experiment_name="rl_math",
        use_wandb=False,
        wandb_project="",
        trackers=[],
        mode="rl",
        source_checkpoint=None,
        checkpoints_keep=2,
        checkpoint_best={},
        on_end=None,
        on_warning=None,
    ),
    provision=None,
)
