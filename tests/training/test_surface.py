"""The names that users import, from where they import them."""

import subprocess
import sys
from pathlib import Path

import pytest

import rollouts.training

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
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'; it has AsyncRolloutManager"):
        _ = rollouts.training.Trainer


def test_importing_the_package_and_its_records_loads_no_torch():
    """Goal: the control side and quick scripts stay quick. Red with one eager import in rollouts/training/__init__."""
    code = "import sys, rollouts.training.types; from rollouts.training import Sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False, timeout=60).returncode == 0
