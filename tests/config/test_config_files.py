"""Config files, Python and JSON: the round trip, and what such a file can get wrong."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from base_config import (
    Config,
    ConfigError,
    LimitsConfig,
    LoraSync,
    TensorSync,
    load_config,
)
from tests.config.parts import a_lora, muon_optimizer, with_changes
from tests.example_config import (
    ahead,
    example_config,
    importance,
    kl,
    policy_loss,
    sglang,
    value_model,
)


def test_json_round_trip_ends_equal(tmp_path: Path) -> None:
    """Goal: config.json of a run is the config that ran. Red when from_json left nested records as dicts."""
    lora, muon = (
        {"model.lora": a_lora(target_modules=["q_proj"])},
        {"sft.optimizer": muon_optimizer()},
    )
    kinds = {
        "engine": sglang(weight_sync=LoraSync(on_tmpfs=True)),
        "rl.loss": policy_loss(dual_clip=3.0),
        "rl.baseline": value_model(clip=0.2),
        "rl.kl": kl(reference="a/b"),
        "rl.ahead": ahead(2, in_flight_updates=True),
    }
    weighted = {
        "rl.loss.importance": importance(),
        "engine.weight_sync": TensorSync(bucket_mib=7),
        "rl.baseline": 0.5,
    }
    for changes in ({**lora, **muon}, kinds, weighted, {"sft": None}):
        config = with_changes(changes)
        config.save(tmp_path / "config.json")
        assert Config.load(tmp_path / "config.json") == config
        assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda data: data["rl"].pop("num_samples"),
            "config.rl.num_samples: missing; RLConfig has no defaults",
        ),
        (
            lambda data: data["rl"].update(n_samples=4),
            "config.rl.n_samples: unknown; RLConfig has num_epochs, ",
        ),
        (
            lambda data: data["rl"].update(loss="grpo"),
            "config.rl.loss: needs an object with \"kind\" (one of 'grpo', ",
        ),
        (
            lambda data: data["rl"]["loss"].pop("kind"),
            "config.rl.loss.kind: missing; needs one of 'grpo', 'ppo', ",
        ),
        (
            lambda data: data["engine"].update(kind="sglan"),
            "config.engine.kind: 'sglan': needs one of 'embedded', ",
        ),
        (
            lambda data: data["engine"].update(kind="vllm"),
            "config.engine.tensor_parallel_size: missing; VLLM has no",
        ),
        (
            lambda data: data["rl"]["loss"].update(clip_low=1),
            "config.rl.loss.clip_low: unknown; GRPO has advantage",
        ),
        (
            lambda data: data.update(sft=3),
            "config.sft: needs an object with the fields of SFTConfig, found int",
        ),
        (
            lambda data: data["data"]["sft_mixture"][0].pop("split"),
            "config.data.sft_mixture[0].split: missing",
        ),
    ],
)
def test_json_with_missing_or_unknown_keys_names_them(
    tmp_path: Path, edit: Any, reason: str
) -> None:
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
            ":3: TargetConfig needs 'hosts', 'hosts_min', 'device_type', ",
        ),
        (
            "from base_config import TargetConfig\nTargetConfig(gpu_ranks=[0], device='cpu')\n",
            ":2: TargetConfig has no field 'device'",
        ),
    ],
)
def test_a_broken_config_file_is_shown_with_its_line(
    tmp_path: Path, text: str, reason: str
) -> None:
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
    hosts=1, hosts_min=1,
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
        (
            "from base_config import TargetConfg\n",
            ":1: ImportError: cannot import name 'TargetConfg'",
        ),
        (
            "from base_config import *\nSFTConfg()\n",
            ":2: NameError: name 'SFTConfg' is not defined",
        ),
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
def test_a_file_that_is_not_a_config_is_told(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
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
