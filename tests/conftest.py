"""How `scripts/test` shares the tests out over its processes: a file stays in one of them, the longest begin first.

No test has a limit on how long it takes but pytest's own, those of hypothesis neither.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import run_processes
from tests.end_with_tests import ended_with_this_process

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# of an activated environment: runs would note that they leave it out
for name in "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT":
    os.environ.pop(name, None)

TESTS = Path(__file__).parent
# A minute and more each, the longest first: what begins late ends late. The rest follows in the order of collection.
LONG = (
    "e2e/test_sglang.py",
    "e2e/test_guide.py",
    "e2e/test_installed.py",
    "e2e/test_resume.py",
    "e2e/test_demo.py",
    "several/test_host_kills.py",
    "engines/test_contract.py",
    "cloud/test_rented_runs.py",
    "cloud/test_rented_hosts.py",
    "worker/test_chaos.py",
    "weights/test_publish.py",
    "e2e/test_faults.py",
    "several/test_engine_hosts.py",
    "several/test_several_hosts.py",
    "several/test_group_runs.py",
    "view/ui/test_pages.py",
    "remote/test_gone_runs.py",
    "cloud/test_interrupted.py",
    "remote/test_copy_verb.py",
    "training/backends/test_fsdp.py",
    "engines/test_router.py",
    "engines/test_engine_pool.py",
    "cloud/test_guards.py",
    "cloud/test_unread.py",
    "cloud/test_sky_pilot.py",
    "worker/test_base_python.py",
    "worker/test_trackers.py",
    "remote/test_slurm.py",
)
# Files that share what takes long to make stay together too: SGLang's server, an environment with pip.
TOGETHER = {
    "sglang": ("weights/test_publish.py", "weights/test_async_rl.py"),
    "prepared": (
        "worker/test_base_python.py",
        "worker/test_bootstrap.py",
        "worker/test_isolation.py",
    ),
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


@pytest.fixture(scope="session", autouse=True)
def own_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let tests look only for processes of the runs that this test process started, and none of them outlive it."""
    run_processes.own_directory = tmp_path_factory.getbasetemp()
    with ended_with_this_process(run_processes.own_directory):
        yield
