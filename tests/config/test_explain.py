"""The schema read as documentation."""

import dataclasses

import pytest

from rollouts.config import schema
from rollouts.config.explain import all_fields, explain, section_docs
from rollouts.config.field_types import ConfigError


def test_every_field_has_a_meaning() -> None:
    """Goal: no field of a config and no section is left unexplained. Red with one comment of the schema removed."""
    assert [field.path for field in all_fields() if not field.meaning] == []
    assert [name for name, doc in section_docs().items() if not doc] == []


def test_every_field_of_every_class_is_listed() -> None:
    """Goal: what is listed are the schema's fields, all of them, of classes that stand in lists and unions too. Red
    with lists not entered."""
    listed = {(field.section, field.name) for field in all_fields()}
    classes = [
        item for name in schema.__all__ if dataclasses.is_dataclass(item := getattr(schema, name))
    ]
    declared = {
        (item.__name__, field.name) for item in classes for field in dataclasses.fields(item)
    }
    assert {pair for pair in declared if pair[0] != "Sections"} == {
        pair for pair in listed if pair[0] != "Config"
    }


@pytest.mark.parametrize(
    ("asked", "paths"),
    [
        ("rl.matrix_lr", ["rl.matrix_lr"]),
        ("matrix_lr", ["sft.matrix_lr", "rl.matrix_lr"]),
        ("rl.loss.dual_clip", ["rl.loss[PPO].dual_clip", "rl.loss[GSPO].dual_clip"]),
        ("rl.loss[PPO].dual_clip", ["rl.loss[PPO].dual_clip"]),
        ("rl.kl", ["rl.kl", "rl.kl.coef", "rl.kl.kind", "rl.kl.reference"]),
    ],
)
def test_a_path_or_a_name(asked: str, paths: list[str]) -> None:
    """Goal: a path finds its field with all below it, a name alone every field of that name. Red with paths compared
    as they stand."""
    assert [field.path for field in explain(asked)] == paths


def test_types_and_meanings_as_one_writes_them() -> None:
    """Goal: choices are in quotes, None and classes by name; a comment of two lines is one text, and so is one behind
    a type of several lines. Red with comments taken from a field's first line alone."""
    (device,) = explain("target.device_type")
    assert device.type == '"cuda" | "cpu" | "mps"'
    assert explain("rl.kl")[0].type == "KLConfig | None" and explain("rl.baseline")[
        0
    ].type.startswith("float | ")
    assert "are made here, without end" in explain("data.sft_mixture.format")[0].meaning
    assert "none: a whole copy each" in explain("target.sharding")[0].meaning


def test_an_unknown_field() -> None:
    """Goal: a misspelt path is an error with the nearest one. Red with an empty answer."""
    with pytest.raises(ConfigError, match=r"no field 'rl.matrx_lr'; did you mean 'rl.matrix_lr'"):
        explain("rl.matrx_lr")
