"""A reward or filter that is not of one argument is refused before anything is built; its module is not imported."""

from pathlib import Path

import pytest

from rollouts.remote.git import list_files
from rollouts.remote.inputs import look_through
from rollouts.remote.inputs.paths import SentFiles
from tests.example_config import example_config, replace_at
from tests.remote.hosts import git

SOURCE = """\
import functools
def one(sample): return 1.0
def defaults(sample, *, strict=True, scale=1.0): return 1.0
def anything(*samples): return 1.0
async def later(sample, /): return 1.0
@functools.cache
def decorated(a, b): return 1.0
def two(prompt, response): return 1.0
def none(): return 1.0
def named(sample, *, scale): return 1.0
async def async_two(prompt, response): return 1.0
"""
FINE = ("one", "defaults", "anything", "later", "decorated")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    (directory / "mine.py").write_text(SOURCE)
    git(directory, "init", "-q")
    return directory


@pytest.mark.parametrize("name", [*FINE, "two", "none", "named", "async_two"])
@pytest.mark.parametrize("field", ["rl.reward.fn", "rl.sampling.filter_fn"])
def test_functions_of_one_argument(field: str, name: str, repository: Path) -> None:
    """Goal: what is called with a Sample alone can be; the message shows the function as it is. Red without the look:
    a TypeError after the whole of SFT. Red too with decorated functions refused."""
    config = replace_at(example_config(), field, f"mine.{name}")
    problems = look_through(config, SentFiles(repository, list_files(repository)), ()).problems
    shown = [problem.text() for problem in problems if field in problem.text()]
    assert len(shown) == (name not in FINE), shown
    if name == "two":
        assert (
            "cannot be called with a" in shown[0] and "mine.py:8: two(prompt, response)" in shown[0]
        )
