"""Checks of what RL minimises, and of generation that runs ahead."""

from rollouts.config.checks.needs import Checks, at_least_one, must
from rollouts.config.schema import CISPO, GRPO, GSPO, PPO, KLConfig, RLConfig, ValueModel


def loss_checks(rl: RLConfig) -> Checks:
    loss = rl.loss
    yield must(loss.entropy_coef >= 0, "rl.loss.entropy_coef", loss.entropy_coef, ">= 0")
    norm_ok = not isinstance(rl.baseline, ValueModel) or loss.advantage_norm != "group_std"
    need = "'none' or 'batch': rl.baseline is a ValueModel, which has advantages of tokens"
    yield must(norm_ok, "rl.loss.advantage_norm", loss.advantage_norm, need)
    if isinstance(loss, GRPO):
        if loss.importance is not None:
            yield must(
                loss.importance.cap > 0, "rl.loss.importance.cap", loss.importance.cap, "> 0"
            )
    else:
        yield from _clip_checks(loss)
    if isinstance(rl.baseline, ValueModel):
        yield from _value_checks(rl.baseline)
    if rl.kl is not None:
        yield from _kl_checks(rl.kl)


def _clip_checks(loss: PPO | GSPO | CISPO) -> Checks:
    yield from at_least_one(loss, "rl.loss", "updates_per_batch")
    yield must(
        0 < loss.clip_low <= 1,
        "rl.loss.clip_low",
        loss.clip_low,
        "0 < clip_low <= 1; 1 sets no lower bound",
    )
    yield must(loss.clip_high > 0, "rl.loss.clip_high", loss.clip_high, "> 0")
    dual_ok = loss.dual_clip is None or loss.dual_clip > 1 + loss.clip_high
    yield must(
        dual_ok, "rl.loss.dual_clip", loss.dual_clip, "> 1 + clip_high, or None for no bound"
    )


def _value_checks(value: ValueModel) -> Checks:
    path = "rl.baseline"
    yield must(0 < value.gamma <= 1, f"{path}.gamma", value.gamma, "0 < gamma <= 1")
    yield must(
        0 <= value.gae_lambda <= 1, f"{path}.gae_lambda", value.gae_lambda, "0 <= gae_lambda <= 1"
    )
    yield must(value.coef > 0, f"{path}.coef", value.coef, "> 0, else no value is learned")
    yield must(
        value.clip is None or value.clip > 0,
        f"{path}.clip",
        value.clip,
        "> 0, or None for no bound",
    )
    yield must(value.lr > 0, f"{path}.lr", value.lr, "> 0")


def _kl_checks(kl: KLConfig) -> Checks:
    yield must(kl.coef > 0, "rl.kl.coef", kl.coef, "> 0; rl.kl=None has no penalty")
    name = kl.reference
    yield must(
        name is None or bool(name.strip()), "rl.kl.reference", name, "a hub id, a directory or None"
    )


def lag_checks(rl: RLConfig) -> Checks:
    """Check generation that runs ahead of training."""
    if rl.ahead is None:
        return
    lag, path, sampling = (
        rl.ahead.policy_lag_steps_max,
        "rl.ahead.policy_lag_steps_max",
        rl.sampling,
    )
    yield must(lag >= 1, path, lag, ">= 1; rl.ahead=None takes turns")
    need = (
        f"rl.ahead=None: rl.sampling.source={sampling.source!r} does not sample what it trains on"
    )
    yield must(sampling.source == "engine", path, lag, need)
    need = f">= rl.sampling.sync_every={sampling.sync_every}: the weights are as old as that in any case"
    yield must(lag >= sampling.sync_every, path, lag, need)
    need = "an ImportanceConfig with rl.ahead: GRPO takes older samples as on-policy"
    corrected = not isinstance(rl.loss, GRPO) or rl.loss.importance is not None
    yield must(corrected, "rl.loss.importance", None, need)
