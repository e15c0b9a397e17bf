"""Every shipped config loads, validates and names data and a model that are there; committed scripts made the files."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from base_config import Config, ConfigError, Embedded, changed, load_config
from rollouts.config import as_source
from rollouts.training.datasets.dataset_loaders import load_prompt_mixture, load_sft_mixture
from rollouts.training.model_loading import load_tokenizer
from rollouts.training.rewards import resolve

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
OFFLINE = [file for file in CONFIGS if file.name.startswith("00_")]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_shipped_config_loads_validates_and_round_trips(file: Path) -> None:
    """Goal: nothing shipped is broken. Red with a field misspelt, and with a batch that does not divide."""
    config = load_config(file)
    assert config.problems() == ()
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_is_shown_as_a_file_that_derives_from_no_other(file: Path, tmp_path: Path) -> None:
    """Goal: what `--show` prints is a complete config file, equal to the one it shows. Red with a field left out, and
    with a nested list's items not spelled out."""
    config = load_config(file)
    shown = tmp_path / "shown.py"
    shown.write_text(as_source(config))
    assert load_config(shown) == config
    assert "changed" not in shown.read_text()


def test_a_config_made_by_changing_another() -> None:
    """Goal: what is named changes, at any depth, and nothing else. Red with the list's other items dropped."""
    demo = load_config(ROOT / "configs/00_cpu_sft_rl.py")
    config = changed(
        demo,
        {
            "rl.sampling.seed": 7,
            "data.rl_mixture.0.max_samples": 5,
            "rl.optimizer.eps": 1e-6,
            "sft": None,
        },
    )
    assert differences(demo, config) == {
        "rl.sampling.seed",
        "data.rl_mixture",
        "rl.optimizer.eps",
        "sft",
    }
    assert config.rl and config.rl.sampling.seed == 7 and config.data.rl_mixture[0].max_samples == 5
    assert demo.rl and demo.rl.sampling.seed != 7


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "rl.sampling.sed",
            "'rl.sampling.sed': SamplingConfig has no field 'sed'; did you mean 'seed'?",
        ),
        ("engin.kind", "'engin.kind': Config has no field 'engin'; did you mean 'engine'?"),
        ("data.rl_mixture.3.name", "'3' is not an index of a list of 1"),
        ("rl.sampling.seed.x", "'rl.sampling.seed.x': int has no field 'x'"),
        ("", "'': Config has no field ''"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, message: str) -> None:
    """Goal: a typo is an error that names the path and the nearest field. Red with setattr on any name."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        changed(load_config(ROOT / "configs/00_cpu_sft_rl.py"), {path: 1})


@pytest.mark.parametrize("file", OFFLINE, ids=lambda file: file.name)
def test_an_offline_configs_data_fits_its_model_and_limits(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: every row renders within max_length, prompts leave room to answer, rewards resolve.

    Red with max_length=12, and with a reward function misspelt.
    """
    monkeypatch.chdir(ROOT)
    config = load_config(file)
    tokenizer = load_tokenizer(config.model.name)
    seed, max_length = config.data.shuffle_seed, config.data.max_length
    for mixture in (config.data.sft_mixture, config.data.eval_mixture):
        if mixture:
            _, report = load_sft_mixture(
                mixture, tokenizer=tokenizer, max_length=max_length, seed=seed
            )
            assert report.left_out == {}
    assert config.rl is not None
    for path in (config.rl.reward_fn, config.rl.agent and config.rl.agent.environment):
        assert path is None or callable(resolve(path))
    assert (
        len(load_prompt_mixture(config.data.rl_mixture, seed=seed)) >= config.rl.examples_per_step
    )


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """Paths of the fields in which two configs differ."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        fields = [field.name for field in dataclasses.fields(one)]
        return {
            d
            for f in fields
            for d in differences(getattr(one, f), getattr(other, f), f"{path}.{f}".lstrip("."))
        }
    return set() if one == other else {path}


def test_the_demo_on_sglang_is_the_demo() -> None:
    """Goal: two files that show everything stay one experiment: they differ in the engine, the number and size of RL
    steps, and what a larger environment needs. Red with another seed in one of them."""
    demo, on_sglang = (
        load_config(ROOT / "configs" / f"00_cpu_sft_rl{name}.py") for name in ("", "_sglang")
    )
    steps = {"rl.num_epochs", "rl.matrix_lr", "rl.embedding_lr", "rl.unembedding_lr"}
    host = {"host.disk_free_gib_min", "limits.engine_ready_timeout_s", "output.experiment_name"}
    assert differences(demo, on_sglang) == steps | host | {"engine"}
    shared = {field.name for field in dataclasses.fields(Embedded)} - {
        "requirements_file",
        "context_length",
    }
    assert all(getattr(demo.engine, name) == getattr(on_sglang.engine, name) for name in shared)


def test_the_demo_as_an_agent_is_the_demo() -> None:
    """Goal: it differs in the episodes, their number, how far SFT goes and how RL samples and steps, and in nothing
    else. Red with another seed in it."""
    demo, agent = (
        load_config(ROOT / "configs" / f"00_cpu_sft_rl{name}.py") for name in ("", "_agent")
    )
    steps = {"data.rl_mixture", "rl.num_epochs", "rl.examples_per_step", "rl.batch_size"}
    longer_sft = {"sft.num_iterations", "sft.eval_every"}
    rates = {
        "rl.matrix_lr",
        "rl.embedding_lr",
        "rl.unembedding_lr",
        "rl.optimizer.warmup_frac",
        "rl.temperature",
    }
    own = {"rl.agent", "rl.reward", "output.experiment_name"}
    assert differences(demo, agent) == steps | longer_sft | rates | own


def test_train_and_test_share_no_row() -> None:
    """Goal: held out is held out. Red when each file was drawn on its own."""
    for directory in (ROOT / "configs" / "data").iterdir():
        seen: set[str] = set()
        for file in sorted(directory.glob("*.jsonl")):
            lines = file.read_text().splitlines()
            assert len(set(lines)) == len(lines) and not seen & set(lines), file
            seen |= set(lines)


@pytest.mark.parametrize(
    "script", ["make_letters_data.py", "make_identity_data.py", "make_tiny_model.py"]
)
def test_the_committed_files_are_what_the_scripts_write(script: str, tmp_path: Path) -> None:
    """Goal: data and model can be made again from the repository alone. Red after a change to either side.

    The script runs in a copy of the tree's layout, so that the repository is not written to.
    """
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts" / script
    copy.write_text((ROOT / "scripts" / script).read_text())
    subprocess.run([sys.executable, str(copy)], check=True, capture_output=True, timeout=200)
    made = [file for file in sorted((tmp_path / "configs").rglob("*")) if file.is_file()]
    assert made
    for file in made:
        assert file.read_bytes() == (ROOT / file.relative_to(tmp_path)).read_bytes(), file
