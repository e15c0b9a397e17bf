"""base_config: no defaults, and every problem at once."""

import dataclasses
import inspect

import pytest

import base_config
from tests.example_config import (
    example_config,
    replace_at,
)

DATACLASSES = [item for _, item in inspect.getmembers(base_config, dataclasses.is_dataclass)]


def test_no_field_has_a_default() -> None:
    """Goal: a config file shows exactly what ran. Red when any field was given a default."""
    assert len(DATACLASSES) >= 10
    for item in DATACLASSES:
        assert item.__dataclass_params__.frozen, item
        for field in dataclasses.fields(item):
            assert field.default is dataclasses.MISSING, f"{item.__name__}.{field.name}"
            assert field.default_factory is dataclasses.MISSING, f"{item.__name__}.{field.name}"
            assert field.kw_only, f"{item.__name__}.{field.name}"


def test_the_example_is_valid() -> None:
    """Goal: the config that all tests here break has no problem itself. Red with mode='rl' and init='random'."""
    assert example_config().problems() == ()


def test_all_problems_at_once() -> None:
    """Goal: a wrong type in one group hides no mistake in another. Red when problems() stopped at the first."""
    config = replace_at(example_config(), "rl.num_samples", 1)
    config = replace_at(config, "sft.batch_size", "8")
    config = replace_at(config, "limits.stop_grace_s", -1.0)
    text = "\n".join(config.problems())
    assert all(
        name in text
        for name in ("rl.num_samples=1", "sft.batch_size='8'", "limits.stop_grace_s=-1.0")
    ), text


@pytest.mark.parametrize(
    "line",
    [
        "a",
        "levenshtein>=0.26",
        "a-b[c,d]~=1.0,!=1.3.*; python_version < '3.13'",
        "a @ https://x.org/a.whl",
    ],
)
def test_requirements_as_pip_names_them(line: str) -> None:
    """Goal: extras, bounds, markers and addresses pass. Red with names alone."""
    assert replace_at(example_config(), "host.requirements", [line]).problems() == ()
