"""How `scripts/test` shares the tests out over its processes: a file stays in one of them, the longest begin first."""

from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
# A minute and more each, the longest first: what begins late ends late. The rest follows in the order of collection.
LONG = (
    "e2e/test_demo.py",
    "e2e/test_sglang.py",
    "worker/test_chaos.py",
    "engines/test_contract.py",
    "e2e/test_faults.py",
)
# Files that share a server which takes half a minute to start: one process's too.
SHARING = {f"tests/weight_transfer/{name}.py": "weight_transfer" for name in ("test_sync", "test_async_rl")}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return SHARING.get(file, file)

    config.option.loadscopereorder = False  # it would begin with the files of the most tests
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {TESTS / name: place for place, name in enumerate(LONG)}
    assert all(file.is_file() for file in first), f"{__file__} names a file that is gone"
    items.sort(key=lambda item: first.get(item.path, len(LONG)))
