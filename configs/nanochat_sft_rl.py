"""nanochat's post-training of late 2025 on a pretrained Qwen2.5-0.5B: SFT on its mixture of tasks, then RL on GSM8K.

The data are nanochat's: each task, its number of rows, its rendering, the shuffles by 42. So are the sizes of both
stages and the advantage, reward minus the mean of the prompt's samples. Learning rates are not: nanochat's are for its
own optimizer on a model of its own, and would destroy a pretrained one under AdamW.

Nor are these, on purpose: a conversation over 2,048 tokens is left out and counted, never cut; RL samples among all
tokens, since the loss is that of the full softmax; the end of a turn is trained in RL too. RL answers GSM8K in words:
its prompts offer no calculator, so the model is not stopped by a call that nobody answers.

Needs the hub and one GPU of 40 GiB (docs/reference/gpu-hosts.md). Set HF_DATASETS_OFFLINE=1 in host.env
once the data sets are in the host's cache.
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

SEED = 42  # of every shuffle, as in nanochat


def task(
    name: str,
    format: str,
    *,
    split: str = "train",
    subset: str | None = None,
    shuffle_seed: int | None = SEED,
    stop: int = -1,
) -> DatasetSpec:
    """The first `stop` rows of a shuffled data set, once. List a task twice, or raise `repeat`, to over-sample it."""
    return DatasetSpec(
        name=name,
        format=format,  # type: ignore[arg-type]  # problems() checks it
        split=split,
        subset=subset,
        shuffle_seed=shuffle_seed,
        start=0,
        stop=stop,
        step=1,
        max_samples=-1,
        streaming=False,
        repeat=1,
    )


ARC = "allenai/ai2_arc"
GSM8K = "openai/gsm8k"

# About 23K rows.
SFT_MIXTURE = [
    task(ARC, "multiple_choice", subset="ARC-Easy"),  # 2.3K
    task(ARC, "multiple_choice", subset="ARC-Challenge"),  # 1.1K
    task(GSM8K, "gsm8k_calculator", subset="main"),  # 7.5K
    task("HuggingFaceTB/smol-smoltalk", "smoltalk", stop=10_000),  # of 460K
    # 1K: scripts/make_identity_data.py
    task("configs/data/identity/train.jsonl", "custom_json", shuffle_seed=None),
    task("simple_spelling", "simple_spelling", shuffle_seed=None, stop=300),
    task("spelling_bee", "spelling_bee", shuffle_seed=None, stop=300),
]
EVAL_MIXTURE = [
    task(ARC, "multiple_choice", split="test", subset="ARC-Easy", stop=500),
    task(ARC, "multiple_choice", split="test", subset="ARC-Challenge", stop=500),
    task(GSM8K, "gsm8k", split="test", subset="main"),  # 1,319
    task("simple_spelling", "simple_spelling", split="test", shuffle_seed=None, stop=100),
]


def adamw(*, beta2: float) -> OptimizerConfig:
    return OptimizerConfig(
        muon=None,
        beta1=0.9,
        beta2=beta2,
        eps=1e-8,
        max_grad_norm=1.0,
        warmup_frac=0.1,
        schedule="linear",
    )


config = Config(
    target=TargetConfig(
        hosts=1,
        hosts_min=1,
        gpu_ranks=[0],
        device_type="cuda",
        sharding="none",
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
        disk_free_gib_min=40.0,
        threads_per_process=4,
    ),
    model=ModelConfig(
        name="Qwen/Qwen2.5-0.5B",
        init="pretrained",
        init_seed=SEED,
        dtype="bfloat16",
        compile=False,
        trust_remote_code=False,
        activation_checkpointing=False,
        lora=None,
    ),
    data=DataConfig(
        sft_mixture=SFT_MIXTURE,
        sft_order="shuffled",
        rl_mixture=[task(GSM8K, "gsm8k", subset="main")],
        eval_mixture=EVAL_MIXTURE,
        max_length=2048,
        shuffle_seed=SEED,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=-1,
        batch_size=4,
        micro_batch_tokens=8192,  # nanochat's 4 rows of 2,048, without their padding
        target_examples_per_step=32,
        unembedding_lr=1e-5,
        embedding_lr=1e-5,
        matrix_lr=1e-5,
        weight_decay=0.1,
        init_lr_frac=1.0,
        eval_every=100,
        eval_steps=100,
        checkpoint_every=-1,
        log_every=10,
        optimizer=adamw(beta2=0.999),
    ),
    rl=RLConfig(
        num_epochs=1,  # of 7,473 prompts: 467 steps
        examples_per_step=16,
        num_samples=16,
        batch_size=8,
        micro_batch_tokens=8192,
        max_new_tokens=256,
        temperature=1.0,
        top_k=-1,
        unembedding_lr=1e-6,
        embedding_lr=1e-6,
        matrix_lr=1e-6,
        weight_decay=0.0,
        init_lr_frac=1.0,
        optimizer=adamw(beta2=0.95),
        eval_every=60,
        eval_examples=400,
        save_every=60,
        log_every=1,
        baseline="group_mean",
        loss=GRPO(
            advantage_norm="none",
            aggregation="token_mean",
            entropy_coef=0.0,
            importance=None,
        ),
        kl=None,
        reward=RewardConfig(fn="rollouts.training.rewards.gsm8k_answer", workers=0),
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
        num_samples=8,
        pass_at=[1, 8],
        temperature=1.0,
        top_k=50,
        seed=SEED,
        in_process_rows=1000,
        in_process_new_tokens=256,
        in_process_batch_tokens=131072,
    ),
    engine=Embedded(
        hosts=None,
        requirements_file=None,
        gpu_ranks=[0],
        sglang_port=30180,
        replicas=1,
        mem_fraction=0.4,
        context_length=2048,
        max_running_requests=256,
        weight_sync=DiskSync(on_tmpfs=False),
        restarts_max=3,
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
        experiment_name="nanochat_sft_rl",
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
