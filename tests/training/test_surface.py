"""The names that users import, from where they import them."""

import subprocess
import sys
from pathlib import Path

import pytest

import rollouts.training
import rollouts.training.datasets
import rollouts.training.rollout_gen

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", rollouts.training.__all__)
def test_every_exported_name_is_there(name):
    """Goal: each re-export of the documented surface resolves. Red with one module name in the table misspelt."""
    assert getattr(rollouts.training, name).__name__ == name
    assert name in dir(rollouts.training)


def test_the_documented_names_are_exported():
    """Goal: no documented name is missing. Red with one taken out of `__all__`."""
    documented = """run_sft_training run_rl_training SFTTrainingConfig RLTrainingConfig RolloutConfig Sample
    RolloutBatch DataBuffer AsyncRolloutManager generate_rollout_batches PyTorchTrainingBackend load_sft_dataset"""
    assert set(rollouts.training.__all__) == set(documented.split())
    with pytest.raises(
        AttributeError, match="has no attribute 'Trainer'; it has AsyncRolloutManager"
    ):
        _ = rollouts.training.Trainer


def test_importing_the_package_and_its_records_loads_no_torch():
    """Goal: the control side and quick scripts stay quick. Red with one eager import in rollouts/training/__init__."""
    code = "import sys, rollouts.training.types; from rollouts.training import Sample; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, check=False, timeout=200
        ).returncode
        == 0
    )


def test_older_scripts_import_from_the_packages():
    """Goal: the names are where such scripts look for them, without torch. Red: the packages were empty."""
    code = (
        "import sys\n"
        "from rollouts.training.rollout_gen import AsyncRolloutManager, generate_rollout_batches\n"
        "from rollouts.training.datasets import DataBuffer, load_sft_dataset\n"
        "import rollouts.training as t, rollouts.training.datasets as d, rollouts.training.rollout_gen as g\n"
        "assert (t.AsyncRolloutManager, t.load_sft_dataset) == (AsyncRolloutManager, load_sft_dataset)\n"
        "assert set(d.__all__) <= set(dir(d)) and set(g.__all__) <= set(dir(g))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, check=False, timeout=200
        ).returncode
        == 0
    )
    for package in (rollouts.training.datasets, rollouts.training.rollout_gen):
        assert all(getattr(package, name).__name__ == name for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'Trainer'; it has"):
            _ = package.Trainer
