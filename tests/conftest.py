"""How `scripts/test` shares the tests out over its processes: a file stays in one of them, the longest begin first.

No test has a limit on how long it takes but pytest's own, those of hypothesis neither.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

for name in (
    "VIRTUAL_ENV",
    "VIRTUAL_ENV_PROMPT",
):  # of an activated environment: runs would note that they leave it out
    os.environ.pop(name, None)

TESTS = Path(__file__).parent
# A minute and more each, the longest first: what begins late ends late. The rest follows in the order of collection.
LONG = (
    "e2e/test_demo.py",
    "e2e/test_sglang.py",
    "e2e/test_guide.py",
    "worker/test_chaos.py",
    "engines/test_contract.py",
    "e2e/test_faults.py",
    "e2e/test_installed.py",
    "several/test_several_hosts.py",
    "several/test_group_runs.py",
    "e2e/test_resume.py",
    "cloud/test_rented_runs.py",
    "worker/test_base_python.py",
)
# Files that share what takes long to make stay together too: SGLang's server, an environment with pip.
TOGETHER = {
    "sglang": ("weights/test_publish.py", "weights/test_async_rl.py"),
    "prepared": ("worker/test_base_python.py", "worker/test_bootstrap.py", "worker/test_isolation.py"),
}
UNITS = {f"tests/{file}": unit for unit, files in TOGETHER.items() for file in files}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return UNITS.get(file, file)

    config.option.loadscopereorder = False  # it would begin with the files of the most tests
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {TESTS / name: place for place, name in enumerate(LONG)}
    assert all(file.is_file() for file in first), f"{__file__} names a file that is gone"
    items.sort(key=lambda item: first.get(item.path, len(LONG)))
