"""Offline, two CPU cores, minutes: the demo's task as an agent's. A wrong answer is told by asking again, once.

The model and its data are those of 00_cpu_sft_rl.py. Episodes have one turn or two; an answer that is right at once
earns 1, at the second time 0.5, and nothing in between: so SFT goes a little further than the demo's, and RL samples
at a lower temperature, that some answers of most groups are right. `scripts/agent_learn_check` holds what it learns.
`environment` names a class of your own as well, beside this file.

    deploy configs/00_cpu_sft_rl_agent.py
"""

from base_config import (
    AgentConfig,
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

SEED = 0  # of the model's weights, the order of the data, and sampling


def letters(name: str, split: str, *, max_samples: int = -1) -> DatasetSpec:
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
        max_samples=max_samples,
        streaming=False,
        repeat=1,
    )


def adamw(*, warmup_frac: float) -> OptimizerConfig:
    return OptimizerConfig(
        kind="adamw",
        muon=None,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        max_grad_norm=1.0,
        warmup_frac=warmup_frac,
        schedule="constant",
    )


config = Config(
    target=TargetConfig(gpu_ranks=[0], device_type="cpu", sharding="none", shard_group_size=-1, cpu_offload=False),
    host=HostConfig(
        installer="pip",
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
        rl_mixture=[letters("train_rl", "train", max_samples=1600)],
        eval_mixture=[letters("test", "test")],
        max_length=32,
        shuffle_seed=SEED,
    ),
    sft=SFTConfig(
        num_epochs=1,
        num_iterations=60,  # 52 leave one sampled answer in 14 right, and RL learns little from so few
        batch_size=128,
        micro_batch_tokens=-1,
        target_examples_per_step=128,
        unembedding_lr=3e-3,
        embedding_lr=3e-3,
        matrix_lr=3e-3,
        weight_decay=0.0,
        init_lr_frac=1.0,
        eval_every=30,
        eval_steps=-1,
        checkpoint_every=-1,
        log_every=5,
        optimizer=adamw(warmup_frac=0.1),
    ),
    rl=RLConfig(
        num_epochs=1,  # of 1,600 prompts: 100 steps
        source="engine",
        examples_per_step=16,
        num_samples=8,
        batch_size=128,
        micro_batch_tokens=-1,
        max_new_tokens=8,
        temperature=0.7,
        top_k=-1,
        unembedding_lr=3e-4,
        embedding_lr=3e-4,
        matrix_lr=3e-4,
        weight_decay=0.0,
        init_lr_frac=1.0,
        eval_every=50,
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
        agent=AgentConfig(
            environment="rollouts.agents.environment.AskAgain",
            tool_format="hermes",
            turns_max=2,
            tokens_max=64,
            timeout_s=600.0,
        ),
        reward_fn=None,
        reward_workers=0,
        filter_fn=None,
        over_sampling_factor=1.0,
        retries_max=0,
        sync_every=1,
        policy_lag_steps_max=0,
        in_flight_updates=False,
        seed=SEED,
        optimizer=adamw(warmup_frac=0.1),
    ),
    eval=EvalConfig(num_samples=0, pass_at=[], temperature=1.0, top_k=-1, seed=SEED),
    engine=EngineConfig(
        kind="embedded",
        requirements_file=None,
        gpu_ranks=[0],
        sglang_port=30180,
        replicas=1,
        router_port=None,
        tensor_parallel_size=1,
        mem_fraction=0.5,
        context_length=2048,
        max_total_tokens=-1,
        max_running_requests=512,
        weight_sync="disk",
        weight_sync_bucket_mib=256,
        weights_on_tmpfs=False,
        sleep_while_training=False,
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
    ),
    output=OutputConfig(
        save_dir="runs",
        log_level="INFO",
        experiment_name="cpu_sft_rl_agent",
        use_wandb=False,
        wandb_project="",
        mode="sft+rl",
        source_checkpoint=None,
        checkpoints_keep=-1,
        checkpoint_best={},
    ),
)
