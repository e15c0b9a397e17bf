"""Threads that parse Python."""

import ast
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from rollouts import python_source
from rollouts.config import SFTConfig


@pytest.mark.parametrize(
    "parse",
    [
        lambda: python_source.parsed("a = 1"),
        lambda: python_source.parsed_expression("1"),
        lambda: python_source.class_source(SFTConfig),
    ],
)
def test_one_at_a_time(parse: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: two threads never parse at once, which fails in some versions of Python. Red without the lock."""
    parse_alone, inside, most = ast.parse, 0, 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)  # others have their chance to come in
        tree = parse_alone(*arguments, **options)
        inside -= 1
        return tree

    monkeypatch.setattr(ast, "parse", watched)
    threads = [threading.Thread(target=parse) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 1  # Python 3.13 finds a class without parsing
