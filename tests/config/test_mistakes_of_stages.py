"""Each way of breaking the stages, the engine, limits and output has a reason of its own."""

from typing import Any

import pytest

from base_config import (
    CISPO,
    GSPO,
    LoraSync,
    Mlflow,
    TensorBoard,
    TensorSync,
    Trackio,
    Wandb,
)
from tests.config.parts import agent, muon_optimizer
from tests.example_config import (
    ahead,
    example_config,
    importance,
    kl,
    policy_loss,
    replace_at,
    sglang,
    value_model,
)

BROKEN: list[tuple[str, Any, str]] = [
    (
        "sft.optimizer",
        muon_optimizer(momentum=1.0),
        "sft.optimizer.muon.momentum=1.0: needs 0 <= momentum < 1",
    ),
    ("sft.optimizer", muon_optimizer(ns_steps=0), "sft.optimizer.muon.ns_steps=0: needs 1 to 99"),
    (
        "sft.optimizer",
        muon_optimizer(vector_lr=-1.0),
        "sft.optimizer.muon.vector_lr=-1.0: needs >= 0",
    ),
    (
        "sft.optimizer",
        muon_optimizer(width_reference=0),
        "sft.optimizer.muon.width_reference=0: needs >= 1, or -1",
    ),
    (
        "sft.optimizer",
        muon_optimizer(adjust_lr="x"),
        "sft.optimizer.muon.adjust_lr='x': needs one of 'original', ",
    ),
    ("sft", None, "sft=None: output.mode='sft+rl' has this stage"),
    ("rl", None, "rl=None: output.mode='sft+rl' has this stage"),
    ("engine", None, "engine=None: output.mode='sft+rl' has an rl stage"),
    (
        "sft.num_iterations",
        0,
        "sft.num_iterations=0: needs >= 1, or -1 for as many as num_epochs make",
    ),
    ("sft.batch_size", 0, "sft.batch_size=0: needs >= 1"),
    (
        "sft.micro_batch_tokens",
        0,
        "sft.micro_batch_tokens=0: needs >= 1, or -1 for batch_size examples",
    ),
    (
        "rl.micro_batch_tokens",
        -2,
        "rl.micro_batch_tokens=-2: needs >= 1, or -1 for batch_size sequences",
    ),
    (
        "sft.target_examples_per_step",
        12,
        "sft.target_examples_per_step=12: needs a multiple of batch_size x ranks",
    ),
    ("sft.matrix_lr", float("nan"), "sft.matrix_lr=nan: needs a finite number"),
    ("sft.matrix_lr", -1e-3, "sft.matrix_lr=-0.001: needs >= 0"),
    ("sft.init_lr_frac", 0.0, "sft.init_lr_frac=0.0: needs 0 < init_lr_frac <= 1"),
    ("sft.optimizer.beta2", 1.0, "sft.optimizer.beta2=1.0: needs 0 <= beta2 < 1"),
    ("sft.optimizer.eps", 0.0, "sft.optimizer.eps=0.0: needs > 0"),
    (
        "sft.optimizer.max_grad_norm",
        0.0,
        "sft.optimizer.max_grad_norm=0.0: needs > 0; 1e9 never clips",
    ),
    ("sft.optimizer.schedule", "step", "sft.optimizer.schedule='step': needs one of"),
    ("sft.optimizer.warmup_frac", 1.0, "sft.optimizer.warmup_frac=1.0: needs 0 <= warmup_frac < 1"),
    (
        "rl.sampling.source",
        "rollouts",
        "rl.sampling.source='rollouts': needs 'engine', 'engine_only' or the path of a run's rollouts.jsonl",
    ),
    ("rl.sampling.source", ".jsonl", "rl.sampling.source='.jsonl': needs 'engine'"),
    ("rl.num_samples", 1, "rl.num_samples=1: needs >= 2, else every advantage is 0"),
    ("rl.temperature", 0.0, "rl.temperature=0.0: needs > 0"),
    ("rl.top_k", 0, "rl.top_k=0: needs >= 1, or -1 for all tokens"),
    ("rl.max_new_tokens", 64, "rl.max_new_tokens=64: needs less than data.max_length=64"),
    (
        "rl.loss",
        policy_loss(clip_low=1.1),
        "rl.loss.clip_low=1.1: needs 0 < clip_low <= 1; 1 sets no lower bound",
    ),
    ("rl.loss", policy_loss(GSPO, clip_high=0.0), "rl.loss.clip_high=0.0: needs > 0"),
    (
        "rl.loss",
        policy_loss(dual_clip=1.2),
        "rl.loss.dual_clip=1.2: needs > 1 + clip_high, or None for no bound",
    ),
    ("rl.loss", "ppo", "rl.loss='ppo': needs one of GRPO, PPO, GSPO, CISPO"),
    ("rl.loss.importance", importance(cap=0.0), "rl.loss.importance.cap=0.0: needs > 0"),
    (
        "rl.loss.importance",
        importance("none"),
        "rl.loss.importance.kind='none': needs one of 'token_truncate'",
    ),
    (
        "rl.loss.advantage_norm",
        "std",
        "rl.loss.advantage_norm='std': needs one of 'none', 'group_std', 'batch'",
    ),
    ("rl.loss.aggregation", "mean", "rl.loss.aggregation='mean': needs one of 'token_mean', "),
    ("rl.kl", kl(coef=0.0), "rl.kl.coef=0.0: needs > 0; rl.kl=None has no penalty"),
    ("rl.kl", kl(reference=" "), "rl.kl.reference=' ': needs a hub id, a directory or None"),
    ("rl.loss.entropy_coef", -1e-3, "rl.loss.entropy_coef=-0.001: needs >= 0"),
    ("rl.reward.fn", "per_letter", "rl.reward.fn='per_letter': needs a dotted path"),
    ("rl.reward", None, "rl.reward=None: needs a RewardConfig: only an agent's"),
    ("rl.reward.workers", -1, "rl.reward.workers=-1: needs >= 0"),
    (
        "rl.agent",
        agent(environment="Environment"),
        "rl.agent.environment='Environment': needs a dotted path",
    ),
    (
        "rl.agent",
        agent(tool_format="xml"),
        "rl.agent.tool_format='xml': needs one of 'hermes', 'json'",
    ),
    ("rl.agent", agent(turns_max=0), "rl.agent.turns_max=0: needs >= 1"),
    (
        "rl.agent",
        agent(tokens_max=4096),
        "rl.agent.tokens_max=4096: needs at most engine.context_length=2048",
    ),
    ("rl.agent", agent(timeout_s=0.0), "rl.agent.timeout_s=0.0: needs > 0 seconds"),
    ("limits.reward_timeout_s", 0.0, "limits.reward_timeout_s=0.0: needs > 0 seconds"),
    ("rl.sampling.filter_fn", "", "rl.sampling.filter_fn='': needs a dotted path"),
    (
        "rl.sampling.over_sampling_factor",
        0.5,
        "rl.sampling.over_sampling_factor=0.5: needs 1 to 16",
    ),
    ("rl.sampling.retries_max", -1, "rl.sampling.retries_max=-1: needs >= 0"),
    ("rl.sampling.sync_every", 0, "rl.sampling.sync_every=0: needs >= 1"),
    (
        "rl.ahead",
        ahead(0),
        "rl.ahead.policy_lag_steps_max=0: needs >= 1; rl.ahead=None takes turns",
    ),
    ("rl.ahead", ahead(1), "rl.loss.importance=None: needs an ImportanceConfig with rl.ahead"),
    (
        "rl.baseline",
        "median",
        "rl.baseline='median': needs one of 'group_mean', 'leave_one_out', float, ValueModel",
    ),
    ("rl.baseline", value_model(gamma=0.0), "rl.baseline.gamma=0.0: needs 0 < gamma <= 1"),
    (
        "rl.baseline",
        value_model(gae_lambda=1.1),
        "rl.baseline.gae_lambda=1.1: needs 0 <= gae_lambda <= 1",
    ),
    (
        "rl.baseline",
        value_model(coef=0.0),
        "rl.baseline.coef=0.0: needs > 0, else no value is learned",
    ),
    ("rl.baseline", value_model(clip=0.0), "rl.baseline.clip=0.0: needs > 0, or None for no bound"),
    ("rl.baseline", value_model(lr=0.0), "rl.baseline.lr=0.0: needs > 0"),
    (
        "rl.baseline",
        value_model(),
        "rl.loss.advantage_norm='group_std': needs 'none' or 'batch': rl.baseline is a",
    ),
    ("rl.loss", policy_loss(CISPO, updates_per_batch=0), "rl.loss.updates_per_batch=0: needs >= 1"),
    ("eval.num_samples", -1, "eval.num_samples=-1: needs >= 0; 0 samples nothing"),
    (
        "eval.num_samples",
        4,
        "eval.pass_at=[]: needs at least one k, or num_samples=4 has no effect",
    ),
    ("eval.pass_at", [1], "eval.pass_at=[1]: needs [], since num_samples=0 samples nothing"),
    ("eval.temperature", 0.0, "eval.temperature=0.0: needs > 0"),
    ("eval.top_k", 0, "eval.top_k=0: needs >= 1, or -1 for all tokens"),
    ("eval.seed", -1, "eval.seed=-1: needs 0 to 2**32 - 1"),
    (
        "eval.in_process_rows",
        -2,
        "eval.in_process_rows=-2: needs >= 1, 0 for none, or -1 for all of eval_mixture",
    ),
    ("eval.in_process_new_tokens", 0, "eval.in_process_new_tokens=0: needs >= 1"),
    ("eval.in_process_batch_tokens", 0, "eval.in_process_batch_tokens=0: needs >= 1"),
    (
        "eval.in_process_batch_tokens",
        63,
        "eval.in_process_batch_tokens=63: needs >= 64: as many tokens as one row",
    ),
    ("engine", "tgi", "engine='tgi': needs one of Embedded, SGLang, VLLM"),
    ("engine.sglang_port", 80, "engine.sglang_port=80: needs 1024 to 65535"),
    ("engine", sglang(tensor_parallel_size=0), "engine.tensor_parallel_size=0: needs >= 1"),
    ("engine.gpu_ranks", [0, 1], "engine.gpu_ranks=[0, 1]: needs length 1"),
    ("engine.replicas", 0, "engine.replicas=0: needs >= 1"),
    (
        "engine.replicas",
        2,
        "engine.gpu_ranks=[0]: needs length 2: replicas=2 x tensor_parallel_size=1",
    ),
    ("engine.context_length", 8, "engine.context_length=8: needs more than rl.max_new_tokens=8"),
    (
        "engine.requirements_file",
        "../x.txt",
        "engine.requirements_file='../x.txt': needs a path inside",
    ),
    (
        "engine",
        sglang(requirements_file=None),
        "engine.requirements_file=None: needs str, found NoneType",
    ),
    (
        "engine",
        sglang(max_total_tokens=None),
        "engine.max_total_tokens=None: needs a number for SGLang on a cpu",
    ),
    ("engine.weight_sync", TensorSync(bucket_mib=0), "engine.weight_sync.bucket_mib=0: needs >= 1"),
    (
        "engine.weight_sync",
        LoraSync(on_tmpfs=False),
        "engine.weight_sync=LoraSync(on_tmpfs=False): needs one of Disk",
    ),
    ("engine.mem_fraction", 0.0, "engine.mem_fraction=0.0: needs 0 < mem_fraction <= 1"),
    ("limits.stage_timeout_s", 0.0, "limits.stage_timeout_s=0.0: needs > 0 seconds"),
    ("output.experiment_name", "a.b", "output.experiment_name='a.b': needs 1 to 48 letters"),
    ("output.mode", "dpo", "output.mode='dpo': needs one of 'sft', 'rl', 'sft+rl'"),
    ("output.mode", "rl", "model.init='random': output.mode='rl' would sample from noise"),
    ("output.use_wandb", True, "output.wandb_project='': needs a name, since use_wandb=True"),
    (
        "output.trackers",
        [Wandb(project=" ", offline=True)],
        "output.trackers[0].project=' ': needs a name",
    ),
    (
        "output.trackers",
        [TensorBoard(project="p", directory=None)] * 2,
        "output.trackers: 2 of kind 'tensorboard'; needs one of a kind",
    ),
    (
        "output.trackers",
        [Trackio(project="p", directory="here")],
        "output.trackers[0].directory='here': needs an absolute path on the host, or None",
    ),
    (
        "output.trackers",
        [Mlflow(project="p", tracking_uri="https://me:secret@example.org")],
        "output.trackers[0].tracking_uri='https://…@example.org': needs an address",
    ),
    ("output.trackers", ["wandb"], "output.trackers[0]='wandb': needs one of Wandb, Trackio"),
    (
        "output.source_checkpoint",
        "",
        "output.source_checkpoint='': needs a directory on the host, or None",
    ),
    ("output.save_dir", 7, "output.save_dir=7: needs str, found int"),
    ("output.on_end", " ", "output.on_end=' ': needs a shell command, or None"),
    ("output.on_warning", "", "output.on_warning='': needs a shell command, or None"),
    ("output.checkpoints_keep", 0, "output.checkpoints_keep=0: needs >= 1, or -1 for all of them"),
    (
        "output.checkpoint_best",
        {"sft": "loss"},
        "output.checkpoint_best['sft']='loss': needs 'min <metric>' or",
    ),
    (
        "output.checkpoint_best",
        {"dpo": "min loss"},
        "output.checkpoint_best={'dpo': 'min loss'}: needs keys 'sft'",
    ),
    (
        "output.checkpoint_best",
        {"rl": "max x"},
        "output.checkpoint_best['rl']='max x': needs checkpoints_keep >= 1",
    ),
]


@pytest.mark.parametrize(("path", "value", "reason"), BROKEN, ids=lambda item: str(item)[:40])
def test_each_way_of_breaking_it_has_its_own_reason(path: str, value: Any, reason: str) -> None:
    """Goal: one break, one readable reason with path, value and rule. Red: removing a check leaves its row without."""
    problems = replace_at(example_config(), path, value).problems()
    assert len([problem for problem in problems if reason in problem]) == 1, problems
