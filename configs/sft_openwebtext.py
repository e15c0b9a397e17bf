"""Continue pretraining Qwen2.5-0.5B on plain web text: 20,000 documents streamed from the hub, no set fetched whole.

Documents are not conversations: every token after the first is trained, EOS ends each, and one over 1,024 tokens
becomes several examples. The held-out documents are the first 500 of the same stream; training begins after them.

Needs the hub and one GPU of 40 GiB (docs/reference/gpu-hosts.md).
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
HELD_OUT = 500


def openwebtext(*, start: int, stop: int) -> DatasetSpec:
    """Documents [start, stop) of a stream that every call shuffles alike: two slices share none."""
    return DatasetSpec(
        name="Skylion007/openwebtext",
        format="text",
        split="train",
        subset=None,
        shuffle_seed=SEED,
        start=start,
        stop=stop,
        step=1,
        max_samples=-1,
        streaming=True,
        repeat=1,
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
        env={"TOKENIZERS_PARALLELISM": "true"},
        secrets=[],
        disk_free_gib_min=30.0,
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
        sft_mixture=[openwebtext(start=HELD_OUT, stop=HELD_OUT + 20_000)],
        sft_order="shuffled",
        rl_mixture=[],
        eval_mixture=[openwebtext(start=0, stop=HELD_OUT)],
        max_length=1024,
        shuffle_seed=SEED,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=-1,
        batch_size=8,
        micro_batch_tokens=16_384,
        target_examples_per_step=64,
        unembedding_lr=1e-5,
        embedding_lr=1e-5,
        matrix_lr=1e-5,
        weight_decay=0.1,
        init_lr_frac=1.0,
        eval_every=100,
        eval_steps=-1,
        checkpoint_every=200,
        log_every=10,
        optimizer=OptimizerConfig(
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            max_grad_norm=1.0,
            warmup_frac=0.05,
            schedule="cosine",
            muon=None,
        ),
    ),
    rl=None,
    eval=EvalConfig(
        num_samples=0,
        pass_at=[],
        temperature=1.0,
        top_k=-1,
        seed=SEED,
        in_process_rows=0,  # plain text asks nothing
        in_process_new_tokens=1,
        in_process_batch_tokens=131072,
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
        experiment_name="sft_openwebtext",
        use_wandb=False,
        wandb_project="",
        trackers=[],
        mode="sft",
        source_checkpoint=None,
        checkpoints_keep=-1,
        checkpoint_best={},
        on_end=None,
        on_warning=None,
    ),
    provision=None,
)
