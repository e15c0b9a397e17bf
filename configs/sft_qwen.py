"""SFT of Qwen2.5-1.5B on 100,000 SmolTalk conversations: one pass, sharded over two GPUs.

Needs the hub and two GPUs of 24 GiB (docs/reference/gpu-hosts.md).
"""

from base_config import (
    Config,
    DataConfig,
    DatasetSpec,
    EvalConfig,
    HostConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SFTConfig,
    TargetConfig,
)

SEED = 42


def smoltalk(split: str, *, max_samples: int) -> DatasetSpec:
    """Conversations of a mixture made for small models."""
    return DatasetSpec(
        name="HuggingFaceTB/smol-smoltalk",
        format="smoltalk",
        split=split,
        subset=None,
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
        name="Qwen/Qwen2.5-1.5B",
        init="pretrained",
        init_seed=SEED,
        dtype="bfloat16",
        compile=False,
        trust_remote_code=False,
        activation_checkpointing=True,
        lora=None,
    ),
    data=DataConfig(
        sft_mixture=[smoltalk("train", max_samples=100_000)],
        sft_order="shuffled",
        rl_mixture=[],
        eval_mixture=[smoltalk("test", max_samples=500)],
        max_length=2048,
        shuffle_seed=SEED,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=-1,
        batch_size=4,
        micro_batch_tokens=16_384,
        target_examples_per_step=128,
        unembedding_lr=1e-5,
        embedding_lr=1e-5,
        matrix_lr=1e-5,
        weight_decay=0.1,
        init_lr_frac=1.0,
        eval_every=200,
        eval_steps=-1,
        checkpoint_every=200,
        log_every=10,
        optimizer=adamw(warmup_frac=0.1),
    ),
    rl=None,
    eval=EvalConfig(
        num_samples=0,
        pass_at=[],
        temperature=1.0,
        top_k=-1,
        seed=SEED,
        in_process_rows=100,
        in_process_new_tokens=512,
        in_process_batch_tokens=65536,
    ),
    engine=None,
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
        experiment_name="sft_qwen",
        use_wandb=False,
        wandb_project="",
        trackers=[],
        mode="sft",
        source_checkpoint=None,
        checkpoints_keep=2,
        checkpoint_best={},
        on_end=None,
        on_warning=None,
    ),
    provision=None,
)
