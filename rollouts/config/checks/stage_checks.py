"""Checks of the stages: rates, optimizer, loss, lag."""

from rollouts.config.checks.loss import lag_checks, loss_checks
from rollouts.config.checks.needs import (
    Checks,
    at_least_one,
    dotted_check,
    must,
    one_or_off,
    seed_check,
)
from rollouts.config.schema import AgentConfig, RLConfig, SamplingConfig, Sections, SFTConfig
from rollouts.config.schema.rl import ENGINE_SOURCES


def stage_checks(stage: SFTConfig | RLConfig, path: str) -> Checks:
    """Check what both stages have: learning rates and the optimizer."""
    rates = {name: getattr(stage, name) for name in ("unembedding_lr", "embedding_lr", "matrix_lr")}
    for name, rate in (*rates.items(), ("weight_decay", stage.weight_decay)):
        yield must(rate >= 0, f"{path}.{name}", rate, ">= 0")
    yield (
        any(rate > 0 for rate in rates.values()),
        f"{path}.{{{','.join(rates)}}}=0: nothing would be trained",
    )
    yield must(
        0 < stage.init_lr_frac <= 1,
        f"{path}.init_lr_frac",
        stage.init_lr_frac,
        "0 < init_lr_frac <= 1",
    )
    optimizer, path = stage.optimizer, f"{path}.optimizer"
    yield must(0 <= optimizer.beta1 < 1, f"{path}.beta1", optimizer.beta1, "0 <= beta1 < 1")
    yield must(0 <= optimizer.beta2 < 1, f"{path}.beta2", optimizer.beta2, "0 <= beta2 < 1")
    yield must(optimizer.eps > 0, f"{path}.eps", optimizer.eps, "> 0")
    yield must(
        optimizer.max_grad_norm > 0,
        f"{path}.max_grad_norm",
        optimizer.max_grad_norm,
        "> 0; 1e9 never clips",
    )
    yield must(
        0 <= optimizer.warmup_frac < 1,
        f"{path}.warmup_frac",
        optimizer.warmup_frac,
        "0 <= warmup_frac < 1",
    )
    muon = optimizer.muon
    if muon is not None:
        yield must(
            0 <= muon.momentum < 1, f"{path}.muon.momentum", muon.momentum, "0 <= momentum < 1"
        )
        yield must(
            1 <= muon.ns_steps < 100, f"{path}.muon.ns_steps", muon.ns_steps, "1 to 99; 5 is usual"
        )
        yield must(muon.vector_lr >= 0, f"{path}.muon.vector_lr", muon.vector_lr, ">= 0")
        yield from one_or_off(muon, f"{path}.muon", width_reference="unchanged rates")


def sft_checks(sft: SFTConfig) -> Checks:
    yield from at_least_one(
        sft, "sft", "num_epochs", "batch_size", "target_examples_per_step", "log_every"
    )
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
    yield must(
        rl.num_samples >= 2, "rl.num_samples", rl.num_samples, ">= 2, else every advantage is 0"
    )
    yield must(
        rl.temperature > 0, "rl.temperature", rl.temperature, "> 0: sampling is what RL learns from"
    )
    yield from loss_checks(rl)
    if rl.reward is None:
        need = "a RewardConfig: only an agent's environment gives rewards itself"
        yield must(rl.agent is not None, "rl.reward", None, need)
    else:
        reward = rl.reward
        yield dotted_check(reward.fn, "rl.reward.fn")
        yield must(reward.workers >= 0, "rl.reward.workers", reward.workers, ">= 0")
    yield from _sampling_checks(rl.sampling)
    yield from lag_checks(rl)
    if rl.agent is not None:
        yield from _agent_checks(rl.agent)
    yield from stage_checks(rl, "rl")


def _sampling_checks(sampling: SamplingConfig) -> Checks:
    source, path = sampling.source, "rl.sampling"
    source_ok = source in ENGINE_SOURCES or (
        source.endswith(".jsonl") and bool(source.removesuffix(".jsonl"))
    )
    yield must(
        source_ok,
        f"{path}.source",
        source,
        "'engine', 'engine_only' or the path of a run's rollouts.jsonl",
    )
    yield seed_check(sampling.seed, f"{path}.seed")
    yield from at_least_one(sampling, path, "sync_every")
    if sampling.filter_fn is not None:
        yield dotted_check(sampling.filter_fn, f"{path}.filter_fn", more=", or None")
    factor = sampling.over_sampling_factor
    yield must(1 <= factor <= 16, f"{path}.over_sampling_factor", factor, "1 to 16")
    yield must(sampling.retries_max >= 0, f"{path}.retries_max", sampling.retries_max, ">= 0")


def _agent_checks(agent: AgentConfig) -> Checks:
    yield dotted_check(agent.environment, "rl.agent.environment", "Class")
    yield from at_least_one(agent, "rl.agent", "turns_max", "tokens_max")
    yield must(agent.timeout_s > 0, "rl.agent.timeout_s", agent.timeout_s, "> 0 seconds")


def rate_checks(config: Sections, name: str) -> Checks:
    """Refuse learning rates that cannot be meant, given the model and the optimizer."""
    stage = getattr(config, name)
    lora = config.model.lora is not None
    if lora:
        yield must(
            stage.matrix_lr > 0,
            f"{name}.matrix_lr",
            stage.matrix_lr,
            "> 0: it is the rate of model.lora",
        )
    for field in ("matrix_lr", "embedding_lr", "unembedding_lr"):
        rate = getattr(stage, field)
        if lora and field != "matrix_lr":
            yield must(
                rate == 0,
                f"{name}.{field}",
                rate,
                "0: with model.lora only adapters are trained, at matrix_lr",
            )
        pretrained_adamw = config.model.init == "pretrained" and stage.optimizer.muon is None
        wild = pretrained_adamw and rate >= 0.01 and rate * stage.init_lr_frac > 1e-4
        need = "about 1e-5 (LoRA: 1e-4) with init_lr_frac=1 for AdamW on a pretrained model; rates such as nanochat's"
        yield must(
            not wild, f"{name}.{field}", rate, f"{need} 0.02 and 0.2 are for an optimizer with muon"
        )
