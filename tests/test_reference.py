"""docs/reference against the code: every field, verb and option is there; pages that are made are as they are made."""

import ast
import dataclasses
import re
from collections.abc import Iterator

import pytest
import typer

import base_config
import deploy
from scripts import make_reference
from tests.docs_blocks import ROOT

REFERENCE = ROOT / "docs" / "reference"


@pytest.mark.parametrize("page", make_reference.PAGES)
def test_a_made_page_is_as_it_is_made(page: str) -> None:
    """Goal: the reference says what the code says. Red with a field's comment changed and the page not made again:
    `python -m scripts.make_reference`."""
    assert (ROOT / page).read_text(encoding="utf-8") == make_reference.PAGES[page]()


def test_every_field_of_a_config_is_documented() -> None:
    """Goal: no class and no field of the schema is left out. Red with a block of config_reference.BLOCKS left out."""
    page = (REFERENCE / "config.md").read_text()
    shown = page.split("\n")
    for name in base_config.__all__:
        cls = getattr(base_config, name)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            continue
        assert f"{name}(" in page, name
        block = page.split(f" = {name}(\n")[1].split("\n)\n")[0]
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if f"\n    {field.name}=" not in f"\n{block}"
        ]
        assert missing == [] and shown, name


def test_every_verb_and_option_is_documented() -> None:
    """Goal: no verb and no option of `deploy` is left out. Red with an option added to deploy.py alone."""
    names = ("cli.md", "cli-runs.md", "cli-more.md", "cli-clouds.md")
    page = "\n".join((REFERENCE / name).read_text() for name in names)
    group = typer.main.get_command(deploy.app)
    for verb, command in group.commands.items():  # type: ignore[attr-defined]
        section = page.split(f"## {make_reference.title_of(verb)}\n")[1].split("\n## ")[0]
        options = [
            name for option in command.params for name in option.opts if name.startswith("-")
        ]
        assert [name for name in options if f"`{name}`" not in section] == [], verb


def calls_of(*names: str) -> Iterator[ast.Call]:
    for path in sorted((ROOT / "rollouts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr
                    if isinstance(node.func, ast.Attribute)
                    else getattr(node.func, "id", "")
                )
                if called in names:
                    yield node


def test_every_kind_of_event_is_documented() -> None:
    """Goal: the kinds of events.md are those that the code writes, no more and no fewer. Red with an event renamed."""
    texts = (
        argument.value
        for call in calls_of("append_event", "_event", "event")
        for argument in call.args[:2]
        if isinstance(argument, ast.Constant)
    )
    documented = re.findall(r"^\| `(\w+)` \|", (REFERENCE / "events.md").read_text(), re.MULTILINE)
    assert sorted(set(texts)) == sorted(documented) and len(documented) > 15


def test_every_metric_that_the_code_names_is_documented() -> None:
    """Goal: a number that a loop adds is in metrics.md, and each number there is named in the code;
    tests/training/test_logged_metrics.py holds the page against real runs. Red with a key added to rollout_metrics."""
    documented = set(
        re.findall(r"^\| `([\w<>]+)` \|", (REFERENCE / "metrics.md").read_text(), re.MULTILINE)
    )
    named, texts = set(), set()
    for path in sorted((ROOT / "rollouts" / "training").rglob("*.py")):
        tree = ast.parse(path.read_text())
        texts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        named |= set(metric_names(tree))
    assert len(named) > 10 and named - documented == set()
    assert {name for name in documented if "<" not in name} - texts == {"optimizer_steps"} - texts


def metric_names(tree: ast.AST) -> Iterator[str]:
    """Keys that are put into what is called `metrics`: by an assignment, by `|=`, by a dict that it begins with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Subscript) and "metrics" in ast.unparse(target.value):
                    yield from (
                        key.value for key in [target.slice] if isinstance(key, ast.Constant)
                    )
                elif "metrics" in ast.unparse(target) and node.value is not None:
                    for inner in ast.walk(node.value):
                        if isinstance(inner, ast.Dict):
                            yield from (
                                key.value for key in inner.keys if isinstance(key, ast.Constant)
                            )
