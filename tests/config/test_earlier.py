"""Config files of earlier versions: a saved config.json is read, a config file is told what its fields are now."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from base_config import (
    CISPO,
    VLLM,
    AheadConfig,
    BroadcastSync,
    Config,
    ConfigError,
    DiskSync,
    ImportanceConfig,
    KLConfig,
    SGLang,
    TensorSync,
    ValueModel,
    changed,
    load_config,
)
from tests.example_config import like_example, policy_loss

ROOT = Path(__file__).resolve().parents[2]
# config.json of shipped configs, as an earlier version wrote them
SAVED = Path(__file__).with_name("saved")
ADAMW_SAME = ("beta1", "beta2", "eps")


@pytest.mark.parametrize("file", sorted(SAVED.glob("*.json")), ids=lambda file: file.stem)
def test_a_saved_config_is_the_shipped_one(file: Path) -> None:
    """Goal: a run of an earlier version can be attached to, resumed and shown. Red with any group left out."""
    said: list[str] = []
    config = Config.load(file, said.append)
    assert config == with_limits_off(load_config(ROOT / "configs" / f"{file.stem}.py"))
    assert len(said) == 1 and str(file) in said[0]
    assert Config.from_json(config.to_json()) == config


def with_limits_off(config: Config) -> Config:
    """Answers in process had no limit but RL's length, or the data's, and what was held at once."""
    length = config.rl.max_new_tokens if config.rl is not None else config.data.max_length
    limits = {"rows": -1, "new_tokens": length, "batch_tokens": 131_072}
    return changed(config, {f"eval.in_process_{name}": value for name, value in limits.items()})


def saved(directory: Path, rl: dict[str, Any], engine: dict[str, Any]) -> Config:
    data = json.loads((SAVED / "00_cpu_sft_rl_sglang.json").read_text())
    data["rl"] |= rl
    data["engine"] |= engine
    file = directory / "config.json"
    file.write_text(json.dumps(data))
    return Config.load(file)


def test_every_setting_finds_its_place(tmp_path: Path) -> None:
    """Goal: values that the shipped configs do not have move too. Red with clip and dual_clip left at -1."""
    value = {"baseline": "value", "gamma": 0.9, "value_lr": 0.5, "advantage_norm": "none"}
    ppo = {"loss": "ppo", "clip_low": 0.1, "dual_clip": 3.0, "updates_per_batch": 2}
    found = saved(
        tmp_path,
        {**value, **ppo, "kl_coef": 0.1, "kl_reference": "a/b"},
        {"weight_sync": "broadcast"},
    )
    assert found.rl is not None and found.engine is not None
    assert found.rl.baseline == ValueModel(gamma=0.9, gae_lambda=0.95, coef=0.5, clip=None, lr=0.5)
    assert found.rl.loss == policy_loss(
        advantage_norm="none", clip_low=0.1, dual_clip=3.0, updates_per_batch=2
    )
    assert found.rl.kl == KLConfig(coef=0.1, kind="k3", reference="a/b")
    assert found.engine.weight_sync == BroadcastSync(bucket_mib=256)
    ahead = {
        "policy_lag_steps_max": 2,
        "in_flight_updates": True,
        "importance": "token_mask",
        "importance_cap": 4.0,
    }
    found = saved(
        tmp_path, ahead, {"weight_sync": "tensor", "max_total_tokens": -1, "router_port": 31000}
    )
    assert found.rl is not None and isinstance(found.engine, SGLang)
    assert found.rl.ahead == AheadConfig(policy_lag_steps_max=2, in_flight_updates=True)
    assert found.rl.loss.importance == ImportanceConfig(kind="token_mask", cap=4.0)
    assert (found.engine.weight_sync, found.engine.max_total_tokens) == (
        TensorSync(bucket_mib=256),
        None,
    )
    assert found.engine.router_port == 31000
    found = saved(
        tmp_path,
        {"loss": "cispo", "reward_fn": None},
        {"kind": "vllm", "requirements_file": "l.txt"},
    )
    assert found.rl is not None and isinstance(found.rl.loss, CISPO) and found.rl.reward is None
    assert isinstance(found.engine, VLLM)
    assert found.engine == like_example(VLLM, found.engine, weight_sync=DiskSync(on_tmpfs=False))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["rl"].pop("clip_low"), None),  # had no effect with loss "grpo"
        (
            lambda data: data["rl"].pop("seed"),
            "config.rl.sampling.seed: missing; SamplingConfig has no defaults",
        ),
        (lambda data: data["rl"].update(sead=1), "config.rl.sead: unknown"),
        (
            lambda data: data["rl"].update(loss="grop"),
            "config.rl.loss.kind: 'grop': needs one of 'grpo', 'ppo'",
        ),
        (
            lambda data: data["engine"].update(weight_sync="disc"),
            "config.engine.weight_sync.kind: 'disc': needs one",
        ),
        (
            lambda data: data["engine"].pop("kind"),
            "config.engine.kind: missing; needs one of 'embedded'",
        ),
        (
            lambda data: data["eval"].update(in_process_rows=7),
            "config.eval.in_process_new_tokens: missing; EvalConfig",
        ),
        (
            lambda data: data["sft"].update(optimizer=3),
            "config.sft.optimizer: needs an object with the fields of",
        ),
    ],
)
def test_what_is_missing_in_a_saved_config_stays_missing(
    tmp_path: Path, change: Any, reason: str | None
) -> None:
    """Goal: nothing is made up. Red with a default for a field that is not there."""
    data = json.loads((SAVED / "00_cpu_sft_rl.json").read_text())
    change(data)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(data))
    if reason is None:
        assert Config.load(file) == with_limits_off(load_config(ROOT / "configs/00_cpu_sft_rl.py"))
        return
    with pytest.raises(ConfigError) as caught:
        Config.load(file)
    assert reason in str(caught.value)


def test_a_config_file_of_earlier_fields_is_told_what_they_are_now(tmp_path: Path) -> None:
    """Goal: each field that moved with what to write today, all at once. Red with only the nearest spelling."""
    text = (ROOT / "configs/00_cpu_sft_rl.py").read_text()
    given = ("seed=SEED", "reward_fn='a.b'", "kl_coef=0.0", "gamma=1.0", "ahead=None")
    flat = "".join(f"        {one},\n" for one in given)
    file = tmp_path / "mine.py"
    file.write_text(text.replace("        ahead=None,\n", flat))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    for part in (
        "RLConfig has no field 'seed'; it is sampling=SamplingConfig(seed=…) now",
        "RLConfig has no field 'reward_fn'; it is reward=RewardConfig(fn=…), or None now",
        "RLConfig has no field 'kl_coef'; it is kl=KLConfig(coef=…), or None now",
        "RLConfig has no field 'gamma'; it is baseline=ValueModel(gamma=…) now",
    ):
        assert part in str(caught.value)
    file.write_text(
        text.replace("    Embedded,\n", "    EngineConfig,\n").replace(
            "engine=Embedded(", "engine=EngineConfig("
        )
    )
    with pytest.raises(
        ConfigError, match=r"EngineConfig.*it is Embedded\(…\), SGLang\(…\) or VLLM\(…\) now"
    ):
        load_config(file)


def test_deploy_says_so_once(tmp_path: Path) -> None:
    """Goal: the user knows that what runs is a translation, and where to see it. Red without `say`."""
    file = tmp_path / "config.json"
    file.write_text((SAVED / "00_cpu_sft_rl.json").read_text())
    command = [sys.executable, str(ROOT / "deploy.py"), str(file), "--show"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("from rollouts.config import *"), (
        done.stderr
    )
    assert done.stderr.count("was written by an earlier version") == 1
