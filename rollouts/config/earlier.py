"""What earlier versions saved, in today's form: fields that came later, and the flat form, before losses, engines and
the like were values of their own."""

from collections.abc import Mapping
from typing import Any

_SAMPLING = ("source", "seed", "sync_every", "filter_fn", "over_sampling_factor", "retries_max")
_AHEAD = ("policy_lag_steps_max", "in_flight_updates")
_CLIPPED = ("clip_low", "clip_high", "updates_per_batch")
_SHARED = ("advantage_norm", "aggregation", "entropy_coef")
_FLAT_RL = (
    *(
        "loss",
        "baseline",
        "gamma",
        "gae_lambda",
        "value_coef",
        "value_clip",
        "value_lr",
        "importance",
    ),
    *(
        "importance_cap",
        "dual_clip",
        "kl_coef",
        "kl_kind",
        "kl_reference",
        "reward_fn",
        "reward_workers",
    ),
    *(*_SAMPLING, *_AHEAD, *_CLIPPED, *_SHARED),
)
_FLAT_ENGINE = ("weight_sync", "weight_sync_bucket_mib", "weights_on_tmpfs")
_OF_GUARDS = {
    "idle_minutes_max": None,
    "allow_unguarded": False,
    "guard_host": None,
    "resumes_max": 0,
}
_ONLY_SGLANG = ("router_port", "max_total_tokens", "sleep_while_training")

# Where a field of the flat form went: class -> field -> what to write today. `mistakes` tells it too.
MOVED: Mapping[str, Mapping[str, str]] = {
    "RLConfig": {
        **{name: f"sampling=SamplingConfig({name}=…)" for name in _SAMPLING},
        **{name: f"ahead=AheadConfig({name}=…), or None" for name in _AHEAD},
        **{name: f"loss=PPO({name}=…), GSPO or CISPO" for name in _CLIPPED},
        **{name: f"loss=GRPO({name}=…), PPO, GSPO or CISPO" for name in _SHARED},
        "dual_clip": "loss=PPO(dual_clip=…) or GSPO, None for no bound",
        "importance": "loss=GRPO(importance=ImportanceConfig(kind=…)), or None",
        "importance_cap": "loss=GRPO(importance=ImportanceConfig(cap=…))",
        "gamma": "baseline=ValueModel(gamma=…)",
        "gae_lambda": "baseline=ValueModel(gae_lambda=…)",
        "value_coef": "baseline=ValueModel(coef=…)",
        "value_clip": "baseline=ValueModel(clip=…), None for no bound",
        "value_lr": "baseline=ValueModel(lr=…)",
        "kl_coef": "kl=KLConfig(coef=…), or None",
        "kl_kind": "kl=KLConfig(kind=…)",
        "kl_reference": "kl=KLConfig(reference=…)",
        "reward_fn": "reward=RewardConfig(fn=…), or None",
        "reward_workers": "reward=RewardConfig(workers=…)",
    },
    "OptimizerConfig": {"kind": "muon=MuonConfig(…), or None for AdamW"},
}
MOVED_CLASSES = {"EngineConfig": "Embedded(…), SGLang(…) or VLLM(…)"}


def in_todays_form(data: Any) -> tuple[Any, bool]:
    """Return a config's JSON as today's schema has it, and whether that changed anything."""
    changed = _with_added_fields(data)
    changed = _regrouped(changed) if _is_flat(changed) else changed
    return changed, changed is not data


def _with_added_fields(data: Any) -> Any:
    """Return `data` with the fields that came after it, as its run behaved.

    A section that lacks only some of them was not written by an earlier version, and stays as it is.
    """
    if not isinstance(data, dict):
        return data
    if "output" in data and "provision" not in data:
        data = {**data, "provision": None}
    provision = data.get("provision")
    if isinstance(provision, dict) and not _OF_GUARDS.keys() & provision.keys():
        data = {**data, "provision": {**provision, **_OF_GUARDS}}
    target, host, limits = data.get("target"), data.get("host"), data.get("limits")
    if isinstance(limits, dict) and "restarts_max" not in limits:
        data = {**data, "limits": {**limits, "restarts_max": 0}}
    if isinstance(target, dict) and "hosts" not in target:
        target = {"hosts": 1, **target}
        data = {**data, "target": target}
    if isinstance(target, dict) and "hosts_min" not in target:
        data = {**data, "target": {**target, "hosts_min": target["hosts"]}}
    engine = data.get("engine")
    if isinstance(engine, dict) and "hosts" not in engine:
        data = {**data, "engine": {"hosts": None, **engine}}
    if isinstance(host, dict) and "requirements" not in host:
        data = {**data, "host": {**host, "requirements": []}}
    output = data.get("output")
    if isinstance(output, dict) and "on_warning" not in output:
        data = {**data, "output": {"on_end": None, "on_warning": None, **output}}
    output = data.get("output")
    if isinstance(output, dict) and "trackers" not in output:
        data = {**data, "output": {"trackers": [], **output}}
    if not isinstance(data.get("eval"), dict):
        return data
    rl, of_data = data.get("rl"), data.get("data")
    length = of_data.get("max_length") if isinstance(of_data, dict) else None
    longest = rl.get("max_new_tokens") if isinstance(rl, dict) else length
    answers = {
        "in_process_rows": -1,
        "in_process_new_tokens": longest,
        "in_process_batch_tokens": 2**17,
    }  # no limit
    return data if answers.keys() & data["eval"] else {**data, "eval": {**data["eval"], **answers}}


def _is_flat(data: Any) -> bool:
    """Return whether `data` is a config of the flat form."""
    rl, engine = (
        (data.get(name) for name in ("rl", "engine")) if isinstance(data, dict) else (None, None)
    )
    stages = [rl, data.get("sft")] if isinstance(data, dict) else []
    optimizers = [stage.get("optimizer") for stage in stages if isinstance(stage, dict)]
    return (
        (isinstance(rl, dict) and isinstance(rl.get("loss"), str) and "sampling" not in rl)
        or (isinstance(engine, dict) and isinstance(engine.get("weight_sync"), str))
        or any(isinstance(optimizer, dict) and "kind" in optimizer for optimizer in optimizers)
    )


def _regrouped(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data`, of the flat form, in today's. What is missing or unknown in it stays so: reading it says which."""
    out = dict(data)
    for name in ("sft", "rl"):
        stage = out.get(name)
        if isinstance(stage, dict) and isinstance(stage.get("optimizer"), dict):
            optimizer = {key: value for key, value in stage["optimizer"].items() if key != "kind"}
            out[name] = {**stage, "optimizer": optimizer}
    rl, engine = out.get("rl"), out.get("engine")
    if isinstance(rl, dict) and isinstance(rl.get("loss"), str):
        out["rl"] = _rl(rl)
    if isinstance(engine, dict) and isinstance(engine.get("weight_sync"), str):
        out["engine"] = _engine(engine)
    return out


def _picked(data: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Return the values of the old names that are there, by their new names."""
    return {new: data[old] for new, old in names.items() if old in data}


def _same(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return _picked(data, **{name: name for name in names})


def _off_is_none(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {**fields, name: None} if fields.get(name) == -1 else fields


def _rl(rl: Mapping[str, Any]) -> dict[str, Any]:
    kind = rl["loss"]
    loss = {"kind": kind, **_same(rl, _SHARED)}
    if kind == "grpo":
        importance = _picked(rl, kind="importance", cap="importance_cap")
        loss["importance"] = None if rl.get("importance") == "none" else importance
    else:
        loss |= _same(rl, _CLIPPED)
        loss |= (
            _off_is_none(_picked(rl, dual_clip="dual_clip"), "dual_clip") if kind != "cispo" else {}
        )
    value = _picked(
        rl,
        gamma="gamma",
        gae_lambda="gae_lambda",
        coef="value_coef",
        clip="value_clip",
        lr="value_lr",
    )
    grouped: dict[str, Any] = {
        "loss": loss,
        "kl": _picked(rl, coef="kl_coef", kind="kl_kind", reference="kl_reference")
        if rl.get("kl_coef") != 0
        else None,
        "reward": _picked(rl, fn="reward_fn", workers="reward_workers")
        if rl.get("reward_fn") is not None
        else None,
        "sampling": _same(rl, _SAMPLING),
        "ahead": _same(rl, _AHEAD) if rl.get("policy_lag_steps_max") != 0 else None,
    }
    if "baseline" in rl:
        grouped["baseline"] = (
            _off_is_none(value, "clip") if rl["baseline"] == "value" else rl["baseline"]
        )
    return {**{name: field for name, field in rl.items() if name not in _FLAT_RL}, **grouped}


def _engine(saved: Mapping[str, Any]) -> dict[str, Any]:
    kind, sync = saved.get("kind"), saved["weight_sync"]
    fields = {name: value for name, value in saved.items() if name not in _FLAT_ENGINE}
    fields = _off_is_none(fields, "max_total_tokens")
    if kind != "sglang":
        fields = {name: value for name, value in fields.items() if name not in _ONLY_SGLANG}
    if kind == "embedded":
        fields.pop("tensor_parallel_size", None)
    how = (
        {"bucket_mib": "weight_sync_bucket_mib"}
        if sync in ("tensor", "broadcast")
        else {"on_tmpfs": "weights_on_tmpfs"}
    )
    only = _picked(saved, **how)
    return {**fields, "weight_sync": only if kind == "vllm" else {"kind": sync, **only}}
