"""base_config: no defaults, every problem at once, JSON round trip, and what a config file can get wrong."""

import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import base_config
from base_config import (
    CISPO,
    GRPO,
    GSPO,
    PPO,
    VLLM,
    AgentConfig,
    Config,
    ConfigError,
    LimitsConfig,
    LoraConfig,
    LoraSync,
    MuonConfig,
    OptimizerConfig,
    TensorSync,
    load_config,
)
from tests.example_config import (
    ahead,
    example_config,
    importance,
    kl,
    like_example,
    policy_loss,
    replace_at,
    sglang,
    value_model,
)

DATACLASSES = [item for _, item in inspect.getmembers(base_config, dataclasses.is_dataclass)]


def test_no_field_has_a_default() -> None:
    """Goal: a config file shows exactly what ran. Red when any field was given a default."""
    assert len(DATACLASSES) >= 10
    for item in DATACLASSES:
        assert item.__dataclass_params__.frozen, item
        for field in dataclasses.fields(item):
            assert field.default is dataclasses.MISSING, f"{item.__name__}.{field.name}"
            assert field.default_factory is dataclasses.MISSING, f"{item.__name__}.{field.name}"
            assert field.kw_only, f"{item.__name__}.{field.name}"


def test_the_example_is_valid() -> None:
    """Goal: the config that all tests here break has no problem itself. Red with mode='rl' and init='random'."""
    assert example_config().problems() == ()


def agent(**changes: Any) -> AgentConfig:
    valid = {"environment": "a.B", "tool_format": "hermes", "turns_max": 2, "tokens_max": 64, "timeout_s": 1.0}
    return AgentConfig(**{**valid, **changes})


def a_lora(**changes: Any) -> LoraConfig:
    valid = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear", "init_seed": 0}
    return LoraConfig(**{**valid, **changes})


def a_muon(**changes: Any) -> MuonConfig:
    constants = {"momentum": 0.95, "nesterov": True, "ns_steps": 5}
    valid = {**constants, "adjust_lr": "original", "vector_lr": 0.01, "width_reference": 768}
    return MuonConfig(**{**valid, **changes})


def muon_optimizer(**changes: Any) -> OptimizerConfig:
    optimizer = example_config().sft.optimizer  # type: ignore[union-attr]
    return dataclasses.replace(optimizer, muon=a_muon(**changes))


BROKEN: list[tuple[str, Any, str]] = [
    ("target.gpu_ranks", [], "target.gpu_ranks=[]: needs at least one device"),
    ("target.gpu_ranks", [0, 0], "target.gpu_ranks=[0, 0]: needs each device once"),
    ("target.gpu_ranks", [-1], "target.gpu_ranks=[-1]: needs device indices"),
    ("target.gpu_ranks", (0,), "target.gpu_ranks=(0,): needs a list"),
    ("target.gpu_ranks", [True], "target.gpu_ranks[0]=True: needs int, found bool"),
    ("target.device_type", "tpu", "target.device_type='tpu': needs one of 'cuda', 'cpu', 'mps'"),
    ("target.sharding", "ddp", "target.sharding='ddp': needs one of 'none', 'full_shard'"),
    ("target.sharding", "hybrid_shard", "target.shard_group_size=-1: needs a divisor of the 1 ranks"),
    ("target.shard_group_size", 1, "target.shard_group_size=1: needs -1: only sharding='hybrid_shard' has groups"),
    ("target.cpu_offload", True, "target.cpu_offload=True: needs False where sharding='none'"),
    ("host.installer", "conda", "host.installer='conda': needs one of 'uv', 'pip'"),
    ("host.constraints_file", "/etc/pins.txt", "host.constraints_file='/etc/pins.txt': needs a path inside"),
    ("host.constraints_file", "../pins.txt", "host.constraints_file='../pins.txt': needs a path inside"),
    ("host.requirements", ["-r more.txt"], "such as 'levenshtein>=0.26'; '-r more.txt' is none"),
    ("host.requirements", ["./vendored"], "'./vendored' is none"),
    ("host.requirements", ["a >= "], "'a >= ' is none"),
    ("host.requirements", ["a==1 # pinned"], "'a==1 # pinned' is none"),
    ("host.requirements", "a", "host.requirements='a': needs a list"),
    ("host.constraints_file", "rollouts:../x", "host.constraints_file='rollouts:../x': needs a path inside"),
    ("host.env", {"A B": "1"}, "host.env['A B']: not the name of an environment variable"),
    ("host.env", {"A": 1}, "host.env={'A': 1}: needs a dict of str to str"),
    ("host.secrets", ["HF_HUB_OFFLINE"], "'HF_HUB_OFFLINE' here or in host.env, which is shown and saved, not both"),
    ("host.secrets", ["my token"], "'my token' is not one"),
    ("host.disk_free_gib_min", -1.0, "host.disk_free_gib_min=-1.0: needs >= 0"),
    ("host.threads_per_process", 0, "host.threads_per_process=0: needs >= 1"),
    ("model.name", " ", "model.name=' ': needs a hub id or a directory"),
    ("model.dtype", "float16", "model.dtype='float16': needs one of 'float32', 'bfloat16'"),
    ("model.init_seed", -1, "model.init_seed=-1: needs 0 to 2**32 - 1"),
    ("model.compile", 1, "model.compile=1: needs bool, found int"),
    ("model.activation_checkpointing", "yes", "model.activation_checkpointing='yes': needs bool, found str"),
    ("model.lora", a_lora(rank=0), "model.lora.rank=0: needs >= 1"),
    ("model.lora", a_lora(alpha=0.0), "model.lora.alpha=0.0: needs > 0"),
    ("model.lora", a_lora(dropout=1.0), "model.lora.dropout=1.0: needs 0 <= dropout < 1"),
    ("model.lora", a_lora(init_seed=-1), "model.lora.init_seed=-1: needs 0 to 2**32 - 1"),
    ("model.lora", a_lora(target_modules=[]), "model.lora.target_modules=[]: needs names of linear layers"),
    ("model.lora", a_lora(target_modules="q_proj"), "='q_proj': needs one of 'all-linear', list[str]"),
    ("model.lora", a_lora(), "rl.embedding_lr=0.001: needs 0: with model.lora only adapters are trained"),
    ("sft.optimizer", muon_optimizer(momentum=1.0), "sft.optimizer.muon.momentum=1.0: needs 0 <= momentum < 1"),
    ("sft.optimizer", muon_optimizer(ns_steps=0), "sft.optimizer.muon.ns_steps=0: needs 1 to 99"),
    ("sft.optimizer", muon_optimizer(vector_lr=-1.0), "sft.optimizer.muon.vector_lr=-1.0: needs >= 0"),
    ("sft.optimizer", muon_optimizer(width_reference=0), "sft.optimizer.muon.width_reference=0: needs >= 1, or -1"),
    ("sft.optimizer", muon_optimizer(adjust_lr="x"), "sft.optimizer.muon.adjust_lr='x': needs one of 'original', "),
    ("data.sft_mixture", [], "data.sft_mixture=[]: empty, and output.mode='sft+rl' trains on it"),
    ("data.rl_mixture", [], "data.rl_mixture=[]: empty, and output.mode='sft+rl' trains on it"),
    ("data.sft_mixture", ["gsm8k"], "data.sft_mixture[0]='gsm8k': needs a DatasetSpec"),
    ("data.sft_mixture.0.repeat", 0, "data.sft_mixture[0].repeat=0: needs >= 1"),
    ("data.rl_mixture.0.max_samples", 0, "data.rl_mixture[0].max_samples=0: needs >= 1, or -1 for all rows"),
    ("data.eval_mixture.0.format", "csv", "data.eval_mixture[0].format='csv': needs one of"),
    ("data.eval_mixture.0.split", "", "data.eval_mixture[0].split='': needs the name of a split"),
    ("data.eval_mixture.0.name", "", "data.eval_mixture[0].name='': needs a hub id"),
    ("data.sft_mixture.0.shuffle_seed", -1, "data.sft_mixture[0].shuffle_seed=-1: needs 0 to 2**32 - 1"),
    ("data.sft_mixture.0.start", -1, "data.sft_mixture[0].start=-1: needs >= 0"),
    ("data.sft_mixture.0.stop", 0, "data.sft_mixture[0].stop=0: needs > start=0, or -1 for the end"),
    ("data.sft_mixture.0.step", 0, "data.sft_mixture[0].step=0: needs >= 1"),
    ("data.sft_mixture.0.streaming", True, "data.sft_mixture[0].max_samples=-1: needs a number, or stop: streaming"),
    ("data.sft_mixture.0.format", "spelling_bee", "data.sft_mixture[0].max_samples=-1: needs a number, or stop: form"),
    ("data.rl_mixture.0.format", "text", "data.rl_mixture[0].format='text': needs a format with prompts"),
    ("data.sft_order", "curriculum", "data.sft_order='curriculum': needs one of 'shuffled', 'sequence'"),
    ("data.max_length", 1, "data.max_length=1: needs >= 2 tokens"),
    ("data.shuffle_seed", 2**32, "data.shuffle_seed=4294967296: needs 0 to 2**32 - 1"),
    ("sft", None, "sft=None: output.mode='sft+rl' has this stage"),
    ("rl", None, "rl=None: output.mode='sft+rl' has this stage"),
    ("engine", None, "engine=None: output.mode='sft+rl' has an rl stage"),
    ("sft.num_iterations", 0, "sft.num_iterations=0: needs >= 1, or -1 for as many as num_epochs make"),
    ("sft.batch_size", 0, "sft.batch_size=0: needs >= 1"),
    ("sft.micro_batch_tokens", 0, "sft.micro_batch_tokens=0: needs >= 1, or -1 for batch_size examples"),
    ("rl.micro_batch_tokens", -2, "rl.micro_batch_tokens=-2: needs >= 1, or -1 for batch_size sequences"),
    ("sft.target_examples_per_step", 12, "sft.target_examples_per_step=12: needs a multiple of batch_size x ranks"),
    ("sft.matrix_lr", float("nan"), "sft.matrix_lr=nan: needs a finite number"),
    ("sft.matrix_lr", -1e-3, "sft.matrix_lr=-0.001: needs >= 0"),
    ("sft.init_lr_frac", 0.0, "sft.init_lr_frac=0.0: needs 0 < init_lr_frac <= 1"),
    ("sft.optimizer.beta2", 1.0, "sft.optimizer.beta2=1.0: needs 0 <= beta2 < 1"),
    ("sft.optimizer.eps", 0.0, "sft.optimizer.eps=0.0: needs > 0"),
    ("sft.optimizer.max_grad_norm", 0.0, "sft.optimizer.max_grad_norm=0.0: needs > 0; 1e9 never clips"),
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
    ("rl.loss", policy_loss(clip_low=1.1), "rl.loss.clip_low=1.1: needs 0 < clip_low <= 1; 1 sets no lower bound"),
    ("rl.loss", policy_loss(GSPO, clip_high=0.0), "rl.loss.clip_high=0.0: needs > 0"),
    ("rl.loss", policy_loss(dual_clip=1.2), "rl.loss.dual_clip=1.2: needs > 1 + clip_high, or None for no bound"),
    ("rl.loss", "ppo", "rl.loss='ppo': needs one of GRPO, PPO, GSPO, CISPO"),
    ("rl.loss.importance", importance(cap=0.0), "rl.loss.importance.cap=0.0: needs > 0"),
    ("rl.loss.importance", importance("none"), "rl.loss.importance.kind='none': needs one of 'token_truncate'"),
    ("rl.loss.advantage_norm", "std", "rl.loss.advantage_norm='std': needs one of 'none', 'group_std', 'batch'"),
    ("rl.loss.aggregation", "mean", "rl.loss.aggregation='mean': needs one of 'token_mean', "),
    ("rl.kl", kl(coef=0.0), "rl.kl.coef=0.0: needs > 0; rl.kl=None has no penalty"),
    ("rl.kl", kl(reference=" "), "rl.kl.reference=' ': needs a hub id, a directory or None"),
    ("rl.loss.entropy_coef", -1e-3, "rl.loss.entropy_coef=-0.001: needs >= 0"),
    ("rl.reward.fn", "per_letter", "rl.reward.fn='per_letter': needs a dotted path"),
    ("rl.reward", None, "rl.reward=None: needs a RewardConfig: only an agent's"),
    ("rl.reward.workers", -1, "rl.reward.workers=-1: needs >= 0"),
    ("rl.agent", agent(environment="Environment"), "rl.agent.environment='Environment': needs a dotted path"),
    ("rl.agent", agent(tool_format="xml"), "rl.agent.tool_format='xml': needs one of 'hermes', 'json'"),
    ("rl.agent", agent(turns_max=0), "rl.agent.turns_max=0: needs >= 1"),
    ("rl.agent", agent(tokens_max=4096), "rl.agent.tokens_max=4096: needs at most engine.context_length=2048"),
    ("rl.agent", agent(timeout_s=0.0), "rl.agent.timeout_s=0.0: needs > 0 seconds"),
    ("limits.reward_timeout_s", 0.0, "limits.reward_timeout_s=0.0: needs > 0 seconds"),
    ("rl.sampling.filter_fn", "", "rl.sampling.filter_fn='': needs a dotted path"),
    ("rl.sampling.over_sampling_factor", 0.5, "rl.sampling.over_sampling_factor=0.5: needs 1 to 16"),
    ("rl.sampling.retries_max", -1, "rl.sampling.retries_max=-1: needs >= 0"),
    ("rl.sampling.sync_every", 0, "rl.sampling.sync_every=0: needs >= 1"),
    ("rl.ahead", ahead(0), "rl.ahead.policy_lag_steps_max=0: needs >= 1; rl.ahead=None takes turns"),
    ("rl.ahead", ahead(1), "rl.loss.importance=None: needs an ImportanceConfig with rl.ahead"),
    ("rl.baseline", "median", "rl.baseline='median': needs one of 'group_mean', 'leave_one_out', float, ValueModel"),
    ("rl.baseline", value_model(gamma=0.0), "rl.baseline.gamma=0.0: needs 0 < gamma <= 1"),
    ("rl.baseline", value_model(gae_lambda=1.1), "rl.baseline.gae_lambda=1.1: needs 0 <= gae_lambda <= 1"),
    ("rl.baseline", value_model(coef=0.0), "rl.baseline.coef=0.0: needs > 0, else no value is learned"),
    ("rl.baseline", value_model(clip=0.0), "rl.baseline.clip=0.0: needs > 0, or None for no bound"),
    ("rl.baseline", value_model(lr=0.0), "rl.baseline.lr=0.0: needs > 0"),
    ("rl.baseline", value_model(), "rl.loss.advantage_norm='group_std': needs 'none' or 'batch': rl.baseline is a"),
    ("rl.loss", policy_loss(CISPO, updates_per_batch=0), "rl.loss.updates_per_batch=0: needs >= 1"),
    ("eval.num_samples", -1, "eval.num_samples=-1: needs >= 0; 0 samples nothing"),
    ("eval.num_samples", 4, "eval.pass_at=[]: needs at least one k, or num_samples=4 has no effect"),
    ("eval.pass_at", [1], "eval.pass_at=[1]: needs [], since num_samples=0 samples nothing"),
    ("eval.temperature", 0.0, "eval.temperature=0.0: needs > 0"),
    ("eval.top_k", 0, "eval.top_k=0: needs >= 1, or -1 for all tokens"),
    ("eval.seed", -1, "eval.seed=-1: needs 0 to 2**32 - 1"),
    ("eval.in_process_rows", -2, "eval.in_process_rows=-2: needs >= 1, 0 for none, or -1 for all of eval_mixture"),
    ("eval.in_process_new_tokens", 0, "eval.in_process_new_tokens=0: needs >= 1"),
    ("eval.in_process_batch_tokens", 0, "eval.in_process_batch_tokens=0: needs >= 1"),
    ("eval.in_process_batch_tokens", 63, "eval.in_process_batch_tokens=63: needs >= 64: as many tokens as one row"),
    ("engine", "tgi", "engine='tgi': needs one of Embedded, SGLang, VLLM"),
    ("engine.sglang_port", 80, "engine.sglang_port=80: needs 1024 to 65535"),
    ("engine", sglang(tensor_parallel_size=0), "engine.tensor_parallel_size=0: needs >= 1"),
    ("engine.gpu_ranks", [0, 1], "engine.gpu_ranks=[0, 1]: needs length 1"),
    ("engine.replicas", 0, "engine.replicas=0: needs >= 1"),
    ("engine.replicas", 2, "engine.gpu_ranks=[0]: needs length 2: replicas=2 x tensor_parallel_size=1"),
    ("engine.context_length", 8, "engine.context_length=8: needs more than rl.max_new_tokens=8"),
    ("engine.requirements_file", "../x.txt", "engine.requirements_file='../x.txt': needs a path inside"),
    ("engine", sglang(requirements_file=None), "engine.requirements_file=None: needs str, found NoneType"),
    ("engine", sglang(max_total_tokens=None), "engine.max_total_tokens=None: needs a number for SGLang on a cpu"),
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
    ("output.source_checkpoint", "", "output.source_checkpoint='': needs a directory on the host, or None"),
    ("output.save_dir", 7, "output.save_dir=7: needs str, found int"),
    ("output.on_end", " ", "output.on_end=' ': needs a shell command, or None"),
    ("output.checkpoints_keep", 0, "output.checkpoints_keep=0: needs >= 1, or -1 for all of them"),
    ("output.checkpoint_best", {"sft": "loss"}, "output.checkpoint_best['sft']='loss': needs 'min <metric>' or"),
    ("output.checkpoint_best", {"dpo": "min loss"}, "output.checkpoint_best={'dpo': 'min loss'}: needs keys 'sft'"),
    ("output.checkpoint_best", {"rl": "max x"}, "output.checkpoint_best['rl']='max x': needs checkpoints_keep >= 1"),
]


@pytest.mark.parametrize(("path", "value", "reason"), BROKEN, ids=lambda item: str(item)[:40])
def test_each_way_of_breaking_it_has_its_own_reason(path: str, value: Any, reason: str) -> None:
    """Goal: one break, one readable reason with path, value and rule. Red: removing a check leaves its row without."""
    problems = replace_at(example_config(), path, value).problems()
    assert len([problem for problem in problems if reason in problem]) == 1, problems


def test_all_problems_at_once() -> None:
    """Goal: a wrong type in one group hides no mistake in another. Red when problems() stopped at the first."""
    config = replace_at(example_config(), "rl.num_samples", 1)
    config = replace_at(config, "sft.batch_size", "8")
    config = replace_at(config, "limits.stop_grace_s", -1.0)
    text = "\n".join(config.problems())
    assert all(name in text for name in ("rl.num_samples=1", "sft.batch_size='8'", "limits.stop_grace_s=-1.0")), text


@pytest.mark.parametrize("name", ["clip_low", "updates_per_batch", "importance", "dual_clip"])
def test_a_loss_has_the_fields_that_it_uses(name: str) -> None:
    """Goal: a setting without effect cannot be written. Red with `dual_clip` a field of every clipped loss."""
    has = {kind.__name__ for kind in (GRPO, PPO, GSPO, CISPO) if name in {f.name for f in dataclasses.fields(kind)}}
    expected = {"importance": {"GRPO"}, "dual_clip": {"PPO", "GSPO"}}
    assert has == expected.get(name, {"PPO", "GSPO", "CISPO"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"engine.router_port": None}, None),
        ({"engine.replicas": 1, "engine.gpu_ranks": [0]}, "engine.router_port=31000: needs None, or more replicas"),
        ({"engine.router_port": 80}, "engine.router_port=80: needs 1024 to 65535, or None"),
        ({"engine.router_port": 30181}, "engine.router_port=30181: needs another port: 30180 to 30181 are the"),
    ],
)
def test_what_a_router_needs(changes: dict[str, Any], reason: str | None) -> None:
    """Goal: a router is in front of several SGLang replicas, on its own port, or is refused with the reason.
    Red with each check left out."""
    routed = sglang(restarts_max=1, replicas=2, gpu_ranks=[0, 1], router_port=31000)
    config = replace_at(example_config(), "engine", routed)
    for path, value in changes.items():
        config = replace_at(config, path, value)
    assert [problem[: len(reason or "")] for problem in config.problems()] == ([reason] if reason else [])


def test_vllm_samples_from_the_whole_distribution() -> None:
    """Goal: a sampler's log-probs are the model's, or the config is refused."""
    engine = like_example(VLLM, example_config().engine, requirements_file="locks/v.txt")
    config = replace_at(example_config(), "engine", engine)
    assert config.problems() == ()
    (problem,) = replace_at(config, "rl.top_k", 20).problems()
    assert problem.startswith("rl.top_k=20: needs -1 with engine=VLLM")


def test_sglangs_cache_holds_a_whole_sequence() -> None:
    """Goal: engine.context_length tokens fit, since SGLang cuts answers short without a word where they do not. Red
    without the check."""
    config = replace_at(example_config(), "engine", sglang())
    assert replace_at(config, "engine.max_total_tokens", 2048).problems() == ()
    (problem,) = replace_at(config, "engine.max_total_tokens", 2047).problems()
    assert problem.startswith("engine.max_total_tokens=2047: needs at least engine.context_length=2048, or None")


@pytest.mark.parametrize("field", ["replicas", "tensor_parallel_size"])
def test_no_devices_are_asked_for_nothing(field: str) -> None:
    """Goal: a count of 0 is told as that, not as devices that are too many. Red with `needs length 0` beside it."""
    problems = replace_at(example_config(), "engine", sglang(**{field: 0})).problems()
    assert not any("engine.gpu_ranks" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"rl.ahead.in_flight_updates": True}, None),
        ({"rl.loss": policy_loss(dual_clip=None)}, None),
        ({"rl.sampling.sync_every": 2}, "rl.ahead.policy_lag_steps_max=1: needs >= rl.sampling.sync_every=2"),
        ({"rl.sampling.source": "engine_only"}, "rl.ahead.policy_lag_steps_max=1: needs rl.ahead=None: rl.sampling.so"),
        (
            {"engine": sglang(sleep_while_training=True)},
            "engine.sleep_while_training=True: needs False: with rl.ahead.policy_lag",
        ),
    ],
)
def test_what_running_ahead_needs(changes: dict[str, Any], reason: str | None) -> None:
    """Goal: a lag without correction, source or room is refused before a launch. Red with each check left out."""
    config = example_config()
    for path, value in {"rl.ahead": ahead(), "rl.loss.importance": importance(), **changes}.items():
        config = replace_at(config, path, value)
    problems = [problem for problem in config.problems() if "lag" in problem]
    assert [problem[: len(reason or "")] for problem in problems] == ([reason] if reason else []), problems


def test_a_sharded_model_may_be_compiled() -> None:
    """Goal: both together are a config. Red with the check that refused it, from when the body was compiled whole."""
    config = replace_at(replace_at(example_config(), "target.sharding", "full_shard"), "model.compile", True)
    assert config.problems() == ()


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("rl.baseline", value_model(), "rl.baseline=ValueModel(gamma=1.0, gae_lambda=0.95, coef=0.5, clip=None"),
        ("rl.sampling.source", "/runs/a/rollouts.jsonl", "data.eval_mixture: needs [] with target.sharding"),
    ],
)
def test_what_a_sharded_model_cannot_do_in_rl(path: str, value: str, problem: str) -> None:
    """Goal: it is refused before a launch, and only with sharding. Red with each check left out."""
    config = replace_at(replace_at(example_config(), "rl.loss.advantage_norm", "none"), path, value)
    assert config.problems() == ()
    (found,) = replace_at(config, "target.sharding", "full_shard").problems()
    assert found.startswith(problem)


def test_only_what_samples_needs_an_engine_and_prompts() -> None:
    """Goal: a replay asks for no engine and no prompts, anything else does. Red with uses_engine always True."""
    config = replace_at(replace_at(example_config(), "engine", None), "data.rl_mixture", [])
    reasons = {
        source: [problem.split(":")[0] for problem in replace_at(config, "rl.sampling.source", source).problems()]
        for source in ("engine", "engine_only", "/runs/a/rollouts.jsonl")
    }
    missing = ["data.rl_mixture=[]", "engine=None"]
    assert reasons == {"engine": missing, "engine_only": missing, "/runs/a/rollouts.jsonl": []}


def test_pass_at_more_than_was_sampled() -> None:
    """Goal: pass@k is estimated from at least k answers. Red with the upper bound left out."""
    config = replace_at(replace_at(example_config(), "eval.num_samples", 4), "eval.pass_at", [1, 5])
    assert config.problems() == ("eval.pass_at=[1, 5]: needs each k within 1 and num_samples=4",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"split": "dev"}, "data.sft_mixture[0].split='dev': needs 'train' or 'test': format='simple_spelling'"),
        ({"subset": "main"}, "data.sft_mixture[0].subset='main': needs None: format='simple_spelling' makes its rows"),
        ({"shuffle_seed": 0}, "data.sft_mixture[0].shuffle_seed=0: needs None"),
        ({"streaming": True}, "data.sft_mixture[0].streaming=True: needs False"),
        ({"max_samples": -1}, "data.sft_mixture[0].max_samples=-1: needs a number, or stop: format='simple_spelling'"),
        ({"max_samples": -1, "stop": 9}, None),
    ],
)
def test_a_synthetic_data_set_has_its_own_rules(changes: dict[str, Any], reason: str | None) -> None:
    """Goal: a setting that made rows would ignore is an error. Red for each with its check taken out."""
    fields = {"name": "spelling", "format": "simple_spelling", "max_samples": 5, **changes}
    config = example_config()
    for name, value in fields.items():
        config = replace_at(config, f"data.sft_mixture.0.{name}", value)
    assert [problem[: len(reason or "")] for problem in config.problems()] == ([reason] if reason else [])


def test_an_evaluation_of_rl_needs_prompts() -> None:
    """Goal: plain text has a validation loss, but RL evaluates answers. Red when any eval_mixture was enough."""
    config = replace_at(example_config(), "data.eval_mixture.0.format", "text")
    assert config.problems() == ()
    (problem,) = replace_at(config, "rl.eval_every", 5).problems()
    assert problem.startswith("rl.eval_every=5: needs -1, or rows with prompts in data.eval_mixture")


def with_changes(changes: dict[str, Any]) -> Config:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config


NANOCHAT = {"model.init": "pretrained", "sft.matrix_lr": 0.02, "sft.embedding_lr": 0.2, "sft.unembedding_lr": 0.004}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (NANOCHAT, ["sft.matrix_lr=0.02", "sft.embedding_lr=0.2"]),
        ({**NANOCHAT, "sft.init_lr_frac": 0.02}, ["sft.matrix_lr=0.02", "sft.embedding_lr=0.2"]),
        ({**NANOCHAT, "sft.optimizer": muon_optimizer()}, []),
        ({**NANOCHAT, "model.init": "random"}, []),
        ({**NANOCHAT, "output.mode": "rl"}, []),
        ({"model.init": "pretrained", "sft.matrix_lr": 0.01, "sft.init_lr_frac": 0.001}, []),
    ],
    ids=["whole", "scaled", "muon", "random", "other-stage", "tiny"],
)
def test_nanochat_s_rates_are_not_for_adamw_on_a_pretrained_model(changes: dict[str, Any], wrong: list[str]) -> None:
    """Goal: refused with the fix where it is certain, and nowhere else. Red with any of its conditions left out."""
    problems = with_changes(changes).problems()
    assert [problem.split(":")[0] for problem in problems] == wrong
    assert all("about 1e-5" in problem and "an optimizer with muon" in problem for problem in problems)


def test_lora_trains_its_adapters_at_matrix_lr_alone() -> None:
    """Goal: no rate without effect, and one with. Red without the check on matrix_lr."""
    rates = {f"{stage}.{name}": 0.0 for stage in ("sft", "rl") for name in ("embedding_lr", "unembedding_lr")}
    lora = {"model.lora": a_lora(), **rates}
    assert with_changes(lora).problems() == ()
    problems = with_changes({**lora, "rl.matrix_lr": 0.0}).problems()
    assert [problem.split(":")[0] for problem in problems if "model.lora" in problem] == ["rl.matrix_lr=0.0"]


@pytest.mark.parametrize("ranks", [[0], [0, 1], [0, 1, 2]])
def test_divisibility_counts_ranks(ranks: list[int]) -> None:
    """Goal: accumulation = target / (batch x ranks) must divide. Red when ranks were left out: 3 ranks passed."""
    problems = replace_at(example_config(), "target.gpu_ranks", ranks).problems()
    assert bool(problems) == (len(ranks) == 3), problems


def test_an_environment_may_reward_instead_of_a_function() -> None:
    """Goal: reward=None goes with an agent. Red with the check for any rl stage."""
    config = replace_at(replace_at(example_config(), "rl.agent", agent()), "rl.reward", None)
    assert config.problems() == () and Config.from_json(config.to_json()) == config


def test_json_round_trip_ends_equal(tmp_path: Path) -> None:
    """Goal: config.json of a run is the config that ran. Red when from_json left nested records as dicts."""
    lora, muon = {"model.lora": a_lora(target_modules=["q_proj"])}, {"sft.optimizer": muon_optimizer()}
    kinds = {
        "engine": sglang(weight_sync=LoraSync(on_tmpfs=True)),
        "rl.loss": policy_loss(dual_clip=3.0),
        "rl.baseline": value_model(clip=0.2),
        "rl.kl": kl(reference="a/b"),
        "rl.ahead": ahead(2, in_flight_updates=True),
    }
    weighted = {"rl.loss.importance": importance(), "engine.weight_sync": TensorSync(bucket_mib=7), "rl.baseline": 0.5}
    for changes in ({**lora, **muon}, kinds, weighted, {"sft": None}):
        config = with_changes(changes)
        config.save(tmp_path / "config.json")
        assert Config.load(tmp_path / "config.json") == config
        assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: data["rl"].pop("num_samples"), "config.rl.num_samples: missing; RLConfig has no defaults"),
        (lambda data: data["rl"].update(n_samples=4), "config.rl.n_samples: unknown; RLConfig has num_epochs, "),
        (lambda data: data["rl"].update(loss="grpo"), "config.rl.loss: needs an object with \"kind\" (one of 'grpo', "),
        (lambda data: data["rl"]["loss"].pop("kind"), "config.rl.loss.kind: missing; needs one of 'grpo', 'ppo', "),
        (
            lambda data: data["engine"].update(kind="sglan"),
            "config.engine.kind: 'sglan': needs one of 'embedded', ",
        ),
        (lambda data: data["engine"].update(kind="vllm"), "config.engine.tensor_parallel_size: missing; VLLM has no"),
        (
            lambda data: data["rl"]["loss"].update(clip_low=1),
            "config.rl.loss.clip_low: unknown; GRPO has advantage",
        ),
        (lambda data: data.update(sft=3), "config.sft: needs an object with the fields of SFTConfig, found int"),
        (lambda data: data["data"]["sft_mixture"][0].pop("split"), "config.data.sft_mixture[0].split: missing"),
    ],
)
def test_json_with_missing_or_unknown_keys_names_them(tmp_path: Path, edit: Any, reason: str) -> None:
    """Goal: a config.json of another version says which keys differ. Red when unknown keys were dropped."""
    data = example_config().to_json()
    edit(data)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        Config.load(file)
    assert reason in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n", "defines no `config`"),
        ("config = 3\n", "`config` is int, needs to be a Config of rollouts.config"),
        ("a = 1\nconfig = Config(\n  x=,\n)\n", ":3: "),
        ("import os\n\nraise KeyError('HF')\n", ":3: KeyError: 'HF'"),
        ("import no_such_module\n", ":1: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "from base_config import TargetConfig\n\nTargetConfig(gpu_ranks=[0])\n",
            ":3: TargetConfig needs 'hosts', 'device_type', 'sharding', ",
        ),
        (
            "from base_config import TargetConfig\nTargetConfig(gpu_ranks=[0], device='cpu')\n",
            ":2: TargetConfig has no field 'device'",
        ),
    ],
)
def test_a_broken_config_file_is_shown_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    """Goal: the user sees file, line and what is wrong, no traceback of ours. Red when exceptions passed through."""
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert reason in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["pipe.json", "device.json", "pipe.py"])
def test_a_config_that_is_not_a_plain_file(name: str, tmp_path: Path) -> None:
    """Goal: a pipe or a device is named, not waited for. Hung without the look at what it is."""
    file = tmp_path / name
    os.mkfifo(file) if name.startswith("pipe") else file.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is not a plain file"):
        load_config(file)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    """Goal: a typo in the path is one clear line, for .py and .json. Red when open()'s error passed through."""
    for name in ("none.py", "none.json"):
        with pytest.raises(ConfigError, match=rf"{name}: no such file"):
            load_config(tmp_path / name)


MISTAKEN = """\
import dataclasses
import base_config as schema
from base_config import *

print("executed")
target = TargetConfig(
    hosts=1,
    gpu_ranks=[0],
    device_typ="cpu",
    sharding="none",
    shard_group_size=-1,
    cpu_offload=False,
)
limits = schema.LimitsConfig(1.0)
longer = dataclasses.replace(limits, stop_grace=3.0)
twice = 2 * longer.sample_timeout_s
"""


def test_every_field_mistake_of_a_config_file_at_once(tmp_path: Path, capsys: Any) -> None:
    """Goal: one try shows every unknown and missing field with file, line and the nearest name, in dataclasses.replace
    too, and what comes after a mistake. Red with the first TypeError's text alone: it had one line of the four."""
    file = tmp_path / "mistaken.py"
    file.write_text(MISTAKEN)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"{file}:6: TargetConfig needs 'device_type': no field has a default",
        f"{file}:9: TargetConfig has no field 'device_typ'; did you mean 'device_type'?",
        f"{file}:14: LimitsConfig takes its fields by name: 1 came without one",
        f"{file}:15: LimitsConfig has no field 'stop_grace'; did you mean 'stop_grace_s'?",
    ]
    assert capsys.readouterr().out == "executed\n", "the second look prints nothing"
    with pytest.raises(TypeError, match="unexpected keyword"):
        LimitsConfig(nothing=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("from base_config import TargetConfg\n", ":1: ImportError: cannot import name 'TargetConfg'"),
        ("from base_config import *\nSFTConfg()\n", ":2: NameError: name 'SFTConfg' is not defined"),
    ],
)
def test_a_mistyped_class_has_its_nearest(tmp_path: Path, text: str, nearest: str) -> None:
    """Goal: a class of the schema that does not exist comes with the one that does. Red with Python's words alone."""
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.py")
    assert nearest in str(caught.value) and "; did you mean" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("deep.json", "[" * 100_000, "deep.json: cannot be read as a config"),
        ("digits.json", "1" * 5000, "digits.json: cannot be read as a config"),
        ("exit.py", "import sys\nsys.exit(3)\n", "exit.py:2: SystemExit: 3"),
    ],
)
def test_a_file_that_is_not_a_config_is_told(name: str, text: str, said: str, tmp_path: Path) -> None:
    """Goal: every such file is a ConfigError. Red with RecursionError and ValueError let out, and with a config that
    exits ending the program without a word."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(tmp_path / name)


def test_every_field_mistake_of_a_config_json_has_its_line(tmp_path: Path) -> None:
    """Goal: unknown, missing and doubled keys of a config.json come at once, with line and nearest name. Red without
    the lines, and with the second of two equal keys taken without a word."""
    data = example_config().to_json()
    data["rl"]["n_samples"] = data["rl"].pop("num_samples")
    data["data"]["rl_mixture"][0]["nmae"] = "x"
    text = json.dumps(data, indent=2).replace('"mode": "', '"mode": "rl",\n    "mode": "')
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    messages = str(caught.value).splitlines()
    where = [int(line.removeprefix(f"{file}:").split(":")[0]) for line in messages]
    assert where == sorted(where) and len(messages) == 4
    shown = dict(zip(where, messages, strict=True))
    for word in ("nmae", "n_samples"):
        (number,) = (n for n, line in shown.items() if f".{word}: unknown" in line)
        assert f'"{word}"' in text.splitlines()[number - 1] and "; did you mean" in shown[number]
    assert any("config.output.mode: given twice" in line for line in messages)
    assert any("config.rl.num_samples: missing" in line for line in messages)


@pytest.mark.parametrize(
    "line", ["a", "levenshtein>=0.26", "a-b[c,d]~=1.0,!=1.3.*; python_version < '3.13'", "a @ https://x.org/a.whl"]
)
def test_requirements_as_pip_names_them(line: str) -> None:
    """Goal: extras, bounds, markers and addresses pass. Red with names alone."""
    assert replace_at(example_config(), "host.requirements", [line]).problems() == ()
