"""Checks of the stages: rates, optimizer, loss, lag."""

from rollouts.config.checks.common import (
    DOTTED_NAME_PATTERN,
    Checks,
    at_least_one,
    matches,
    must,
    one_or_off,
    seed_check,
)
from rollouts.config.schema import AgentConfig, RLConfig, Sections, SFTConfig
from rollouts.config.schema.rl import ENGINE_SOURCES


def stage_checks(stage: SFTConfig | RLConfig, path: str) -> Checks:
    """What both stages have: learning rates and the optimizer."""
    rates = {name: getattr(stage, name) for name in ("unembedding_lr", "embedding_lr", "matrix_lr")}
    for name, rate in (*rates.items(), ("weight_decay", stage.weight_decay)):
        yield must(rate >= 0, f"{path}.{name}", rate, ">= 0")
    yield any(rate > 0 for rate in rates.values()), f"{path}.{{{','.join(rates)}}}=0: nothing would be trained"
    yield must(0 < stage.init_lr_frac <= 1, f"{path}.init_lr_frac", stage.init_lr_frac, "0 < init_lr_frac <= 1")
    optimizer, path = stage.optimizer, f"{path}.optimizer"
    yield must(0 <= optimizer.beta1 < 1, f"{path}.beta1", optimizer.beta1, "0 <= beta1 < 1")
    yield must(0 <= optimizer.beta2 < 1, f"{path}.beta2", optimizer.beta2, "0 <= beta2 < 1")
    yield must(optimizer.eps > 0, f"{path}.eps", optimizer.eps, "> 0")
    yield must(optimizer.max_grad_norm > 0, f"{path}.max_grad_norm", optimizer.max_grad_norm, "> 0; 1e9 never clips")
    yield must(0 <= optimizer.warmup_frac < 1, f"{path}.warmup_frac", optimizer.warmup_frac, "0 <= warmup_frac < 1")
    muon, need = optimizer.muon, "a MuonConfig with kind='muon', None with 'adamw'"
    yield must((muon is not None) == (optimizer.kind == "muon"), f"{path}.muon", muon, need)
    if muon is not None:
        yield must(0 <= muon.momentum < 1, f"{path}.muon.momentum", muon.momentum, "0 <= momentum < 1")
        yield must(1 <= muon.ns_steps < 100, f"{path}.muon.ns_steps", muon.ns_steps, "1 to 99; 5 is usual")
        yield must(muon.vector_lr >= 0, f"{path}.muon.vector_lr", muon.vector_lr, ">= 0")
        yield from one_or_off(muon, f"{path}.muon", width_reference="rates as they stand")


def sft_checks(sft: SFTConfig) -> Checks:
    yield from at_least_one(sft, "sft", "num_epochs", "batch_size", "target_examples_per_step", "log_every")
    yield from one_or_off(
        sft,
        "sft",
        num_iterations="as many as num_epochs make",
        eval_every="only at the end",
        eval_steps="all of eval_mixture",
        micro_batch_tokens="batch_size examples",
        checkpoint_every="only at the end",
    )
    yield from stage_checks(sft, "sft")


def rl_checks(rl: RLConfig) -> Checks:
    yield from at_least_one(
        rl,
        "rl",
        "num_epochs",
        "examples_per_step",
        "batch_size",
        "max_new_tokens",
        "log_every",
        "sync_every",
        "updates_per_batch",
    )
    yield from one_or_off(
        rl,
        "rl",
        top_k="all tokens",
        eval_every="only before and after",
        eval_examples="all of eval_mixture",
        micro_batch_tokens="batch_size sequences",
        save_every="only at the end",
    )
    source_ok = rl.source in ENGINE_SOURCES or (rl.source.endswith(".jsonl") and bool(rl.source.removesuffix(".jsonl")))
    yield must(source_ok, "rl.source", rl.source, "'engine', 'engine_only' or the path of a run's rollouts.jsonl")
    yield must(rl.num_samples >= 2, "rl.num_samples", rl.num_samples, ">= 2, else every advantage is 0")
    yield must(rl.temperature > 0, "rl.temperature", rl.temperature, "> 0: sampling is what RL learns from")
    yield from _loss_checks(rl)
    if rl.reward_fn is None:
        need = "a dotted path, package.module.function: only an agent's environment has rewards of its own"
        yield must(rl.agent is not None, "rl.reward_fn", None, need)
    else:
        reward_ok = matches(DOTTED_NAME_PATTERN, rl.reward_fn)
        yield must(reward_ok, "rl.reward_fn", rl.reward_fn, "a dotted path, package.module.function")
    filter_ok = rl.filter_fn is None or matches(DOTTED_NAME_PATTERN, rl.filter_fn)
    yield must(filter_ok, "rl.filter_fn", rl.filter_fn, "a dotted path, package.module.function, or None")
    factor_ok = 1 <= rl.over_sampling_factor <= 16
    yield must(factor_ok, "rl.over_sampling_factor", rl.over_sampling_factor, "1 to 16")
    yield must(rl.retries_max >= 0, "rl.retries_max", rl.retries_max, ">= 0")
    yield must(rl.reward_workers >= 0, "rl.reward_workers", rl.reward_workers, ">= 0")
    yield from _lag_checks(rl)
    if rl.agent is not None:
        yield from _agent_checks(rl.agent)
    yield seed_check(rl.seed, "rl.seed")
    yield from stage_checks(rl, "rl")


def _agent_checks(agent: AgentConfig) -> Checks:
    path_ok = matches(DOTTED_NAME_PATTERN, agent.environment)
    yield must(path_ok, "rl.agent.environment", agent.environment, "a dotted path, package.module.Class")
    yield from at_least_one(agent, "rl.agent", "turns_max", "tokens_max")
    yield must(agent.timeout_s > 0, "rl.agent.timeout_s", agent.timeout_s, "> 0 seconds")


def _lag_checks(rl: RLConfig) -> Checks:
    """Generation that runs ahead of training."""
    lag, path = rl.policy_lag_steps_max, "rl.policy_lag_steps_max"
    yield must(lag >= 0, path, lag, ">= 0")
    idle = rl.in_flight_updates and lag == 0
    need = "False: with policy_lag_steps_max=0 nothing runs while weights change"
    yield must(not idle, "rl.in_flight_updates", rl.in_flight_updates, need)
    if lag > 0:
        yield must(rl.source == "engine", path, lag, f"0: rl.source={rl.source!r} does not sample what it trains on")
        need = f"0, or >= sync_every={rl.sync_every}: the weights are as old as that in any case"
        yield must(lag >= rl.sync_every, path, lag, need)
        need = "another than 'none' with policy_lag_steps_max > 0: loss='grpo' takes older samples for its own"
        yield must(rl.loss != "grpo" or rl.importance != "none", "rl.importance", rl.importance, need)


def _loss_checks(rl: RLConfig) -> Checks:
    yield must(0 < rl.clip_low <= 1, "rl.clip_low", rl.clip_low, "0 < clip_low <= 1; 1 sets no lower bound")
    yield must(rl.clip_high > 0, "rl.clip_high", rl.clip_high, "> 0")
    dual_ok = rl.dual_clip == -1 or (rl.dual_clip > 1 + rl.clip_high and rl.loss in ("ppo", "gspo"))
    yield must(dual_ok, "rl.dual_clip", rl.dual_clip, "> 1 + clip_high with loss 'ppo' or 'gspo', or -1 for no bound")
    importance_ok = rl.importance == "none" or rl.loss == "grpo"
    yield must(importance_ok, "rl.importance", rl.importance, f"'none': loss={rl.loss!r} has the ratio to the sampler")
    yield must(rl.importance_cap > 0, "rl.importance_cap", rl.importance_cap, "> 0")
    yield must(0 < rl.gamma <= 1, "rl.gamma", rl.gamma, "0 < gamma <= 1")
    yield must(0 <= rl.gae_lambda <= 1, "rl.gae_lambda", rl.gae_lambda, "0 <= gae_lambda <= 1")
    yield must(rl.value_coef > 0, "rl.value_coef", rl.value_coef, "> 0, else no value is learned")
    yield must(rl.value_clip > 0 or rl.value_clip == -1, "rl.value_clip", rl.value_clip, "> 0, or -1 for no bound")
    yield must(rl.value_lr > 0, "rl.value_lr", rl.value_lr, "> 0")
    norm_ok = rl.baseline != "value" or rl.advantage_norm != "group_std"
    need = "'none' or 'batch': baseline='value' has advantages of tokens"
    yield must(norm_ok, "rl.advantage_norm", rl.advantage_norm, need)
    bounded = rl.loss != "grpo" or rl.updates_per_batch == 1
    need = "1 with loss='grpo', which has no bound on the ratio; or 'ppo', 'gspo', 'cispo'"
    yield must(bounded, "rl.updates_per_batch", rl.updates_per_batch, need)
    yield must(rl.kl_coef >= 0, "rl.kl_coef", rl.kl_coef, ">= 0")
    name = rl.kl_reference
    yield must(name is None or bool(name.strip()), "rl.kl_reference", name, "a hub id, a directory or None")
    yield must(rl.entropy_coef >= 0, "rl.entropy_coef", rl.entropy_coef, ">= 0")


def rate_checks(config: Sections, name: str) -> Checks:
    """Learning rates that cannot be meant, given the model and the optimizer."""
    stage = getattr(config, name)
    lora = config.model.lora is not None
    if lora:
        yield must(stage.matrix_lr > 0, f"{name}.matrix_lr", stage.matrix_lr, "> 0: it is the rate of model.lora")
    for field in ("matrix_lr", "embedding_lr", "unembedding_lr"):
        rate = getattr(stage, field)
        if lora and field != "matrix_lr":
            yield must(rate == 0, f"{name}.{field}", rate, "0: with model.lora only adapters are trained, at matrix_lr")
        pretrained_adamw = config.model.init == "pretrained" and stage.optimizer.kind == "adamw"
        wild = pretrained_adamw and rate >= 0.01 and rate * stage.init_lr_frac > 1e-4
        need = "about 1e-5 (LoRA: 1e-4) with init_lr_frac=1 for AdamW on a pretrained model; rates such as nanochat's"
        yield must(not wild, f"{name}.{field}", rate, f"{need} 0.02 and 0.2 are for optimizer.kind='muon'")
