"""Two configs, field by field."""

from pathlib import Path

from base_config import changed, load_config
from rollouts.config.diff import MISSING, Difference, differences
from tests.example_config import example_config, kl, policy_loss

ROOT = Path(__file__).resolve().parents[2]


def test_equal_configs() -> None:
    """Goal: a config does not differ from itself. Red with groups compared by identity."""
    assert differences(example_config(), example_config()) == ()


def test_values_groups_and_lists() -> None:
    """Goal: each changed value is named by its path; a group that appears, or is of another class, with its fields.
    Red with a group compared as a whole."""
    base = example_config()
    other = changed(
        base,
        {"rl.matrix_lr": 2e-3, "rl.kl": kl(), "rl.loss": policy_loss(), "data.eval_mixture": []},
    )
    found = {item.path: item for item in differences(base, other)}
    assert found["rl.matrix_lr"] == Difference("rl.matrix_lr", 1e-3, 2e-3)
    assert (found["rl.kl"].before, found["rl.kl"].after) == (None, "KLConfig")
    assert found["rl.kl.coef"].before == MISSING
    assert (found["rl.loss"].before, found["rl.loss"].after) == (
        "GRPO",
        type(other.rl.loss).__name__,
    )
    assert found["data.eval_mixture.0"].after == MISSING
    assert "rl.loss.advantage_norm" not in found, "both have it, with the same value"


def test_true_is_not_one() -> None:
    """Goal: values of another type differ, though Python calls them equal. Red with `!=` alone."""
    base = example_config()
    assert [item.path for item in differences(base, changed(base, {"model.compile": 0}))] == [
        "model.compile"
    ]


def test_a_derived_config_differs_by_what_it_changes() -> None:
    """Goal: what a shipped config changes of another is what the diff names, and no more. Red with sections skipped."""
    load = [
        load_config(ROOT / "configs" / name)
        for name in ("00_cpu_sft_rl.py", "00_cpu_sft_rl_agent.py")
    ]
    paths = [item.path for item in differences(*load)]
    assert "rl.agent.turns_max" in paths and "output.experiment_name" in paths
    assert not [
        path
        for path in paths
        if path.startswith(("target", "host", "model", "engine", "limits", "eval"))
    ]
