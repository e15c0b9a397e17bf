"""One GPU, 15 to 20 minutes: Qwen2.5-0.5B-Instruct, 100 SFT steps on 1K SmolTalk conversations, then GRPO on 500 GSM8K
problems, sampled by SGLang on the same GPU. Small enough to see a whole run on real hardware go wrong quickly.

    deploy configs/01_debug_sft_rl.py --remote user@host --plan

Needs the hub and a GPU of 24 GiB (docs/reference/gpu-hosts.md), which trainer and engine share: layers are computed
again in the backward pass, and the engine gets a third of the GPU. On a larger one both may be as usual.
"""

from base_config import (
    GRPO,
    Config,
    DataConfig,
    DatasetSpec,
    DiskSync,
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
    SGLang,
    TargetConfig,
)

SEED = 42


def smoltalk() -> DatasetSpec:
    """1K of 460K conversations."""
    return DatasetSpec(
        name="HuggingFaceTB/smol-smoltalk",
        format="smoltalk",
        split="train",
        subset=None,
        shuffle_seed=SEED,
        start=0,
        stop=-1,
        step=1,
        max_samples=1000,
        streaming=False,
        repeat=1,
    )


def gsm8k(split: str, *, max_samples: int) -> DatasetSpec:
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
        max_samples=max_samples,
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
        name="Qwen/Qwen2.5-0.5B-Instruct",
        init="pretrained",
        init_seed=SEED,
        dtype="bfloat16",
        compile=False,
        trust_remote_code=False,
        activation_checkpointing=True,
        lora=None,
    ),
    data=DataConfig(
        sft_mixture=[smoltalk()],
        sft_order="shuffled",
        rl_mixture=[gsm8k("train", max_samples=500)],
        eval_mixture=[gsm8k("test", max_samples=200)],
        max_length=2048,
        shuffle_seed=SEED,
    ),
    sft=SFTConfig(
        num_epochs=2,  # of 1,000 conversations: num_iterations ends it
        num_iterations=100,
        batch_size=4,
        micro_batch_tokens=8192,
        target_examples_per_step=16,
        unembedding_lr=1e-5,
        embedding_lr=1e-5,
        matrix_lr=1e-5,
        weight_decay=0.1,
        init_lr_frac=1.0,
        eval_every=50,
        eval_steps=-1,
        checkpoint_every=-1,
        log_every=10,
        optimizer=adamw(warmup_frac=0.1),
    ),
    rl=RLConfig(
        num_epochs=1,  # of 500 prompts: 62 steps
        examples_per_step=8,
        num_samples=8,
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
        optimizer=adamw(warmup_frac=0.05),
        eval_every=20,
        eval_examples=100,
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
        num_samples=0,
        pass_at=[],
        temperature=1.0,
        top_k=-1,
        seed=SEED,
        in_process_rows=200,
        in_process_new_tokens=256,
        in_process_batch_tokens=65536,
    ),
    engine=SGLang(
        hosts=None,
        requirements_file="requirements/sglang-cuda.txt",
        gpu_ranks=[0],  # the trainer's: colocated
        sglang_port=30180,
        replicas=1,
        router_port=None,
        tensor_parallel_size=1,
        mem_fraction=0.35,
        context_length=2048,
        max_total_tokens=None,
        max_running_requests=256,
        weight_sync=DiskSync(on_tmpfs=True),
        sleep_while_training=False,
        restarts_max=2,
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
        experiment_name="debug_sft_rl",
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
