"""The pages of docs/guide, block after block, in one copy of this repository: what each shows is what happens.

The demo is cut to a few steps there. The first page's run is real; the pages after it look at that run, or plan.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs_blocks import GUIDE, PAGES, ROOT, Block, blocks_of
from tests.e2e.conftest import a_laptop, copy_of_repository
from tests.ports import free_port
from tests.remote.hosts import Laptop, git
from tests.training.process_nursery import shared

FIRST = "docs/guide/first-run.md"
ELSEWHERE = ("docs/guide/tutorial.md",)  # begins in an empty directory: test_installed.py
SHORT = """

from base_config import changed

config = changed(
    config,
    {
        "host.installer": "uv",
        "host.torch_build": "index",
        "host.disk_free_gib_min": 0.1,
        "engine.sglang_port": PORT,
        "sft.num_iterations": 6,
        "sft.eval_every": 3,
        "rl.num_epochs": 2,
        "rl.examples_per_step": 4,
        "rl.num_samples": 4,
        "rl.eval_every": 4,
        "rl.eval_examples": 20,
        "data.rl_mixture.0.max_samples": 16,
        "data.eval_mixture.0.max_samples": 40,
    },
)
"""
CHECKS = {
    "docs/guide/your-reward.md": "True",
}


@pytest.fixture(scope="module")
def reader(
    tmp_path_factory: pytest.TempPathFactory, environments: Path, tool_path: str
) -> Iterator[Laptop]:
    """Someone who has cloned the repository and reads the guide there."""
    directory = tmp_path_factory.mktemp("guide")
    project = copy_of_repository(directory / "rollouts")
    with (project / "configs" / "00_cpu_sft_rl.py").open("a") as demo:
        demo.write(SHORT.replace("PORT", str(free_port())))
    git(project, "commit", "-qam", "a short demo")
    with a_laptop(directory / "home", environments, tool_path) as laptop:
        laptop.project = project
        laptop.environment["PATH"] = f"{directory / 'bin'}:{laptop.environment['PATH']}"
        (directory / "bin").mkdir()
        program = directory / "bin" / "deploy"
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {ROOT}/tests/guide_deploy.py "$@"\n'
        )
        program.chmod(0o755)
        yield laptop


def follow(page: str, reader: Laptop, log: Path) -> None:
    """Run all blocks of a page, with what they print compared; AssertionError shows where they differ."""
    arguments = [str(reader.project), page, "", CHECKS.get(page, "True")]
    environment = reader._environment({})
    code = shared().wait(
        shared().start("tests.docs_blocks", arguments, log, environment=environment)
    )
    assert code == 0, log.read_text()[-6000:]


@pytest.fixture(scope="module")
def first_run(reader: Laptop) -> None:
    follow(FIRST, reader, reader.project.parent / "first.log")


@pytest.mark.timeout(1500)  # the environment may have to be built first
@pytest.mark.usefixtures("first_run")
def test_the_first_run() -> None:
    """Goal: what a newcomer copies first works, and prints what the page says. Red with another line of output."""


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("first_run")
@pytest.mark.parametrize("page", [page for page in GUIDE if page not in (FIRST, *ELSEWHERE)])
def test_a_page_of_the_guide(page: str, reader: Laptop, tmp_path: Path) -> None:
    """Goal: likewise for each other page. Red with a verb, a field or a printed line that is another today."""
    follow(page, reader, tmp_path / "log")


LOOKS = [
    block
    for page in PAGES
    if page not in GUIDE
    for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))
    if block.language == "sh" and block.text.split()[0] in ("jq", "tail", "ls", "git")
]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("first_run")
@pytest.mark.parametrize(
    "block", [b for b in LOOKS if "clone" not in b.text], ids=lambda b: f"{b.page}:{b.line}"
)
def test_a_look_at_a_run(block: Block, reader: Laptop) -> None:
    """Goal: what other pages ask of a run's files is answered by a real run. Red with a field of an event renamed in a
    page, where jq then fails, and with a file that no run has."""
    results = reader.project / "runs" / "cpu_sft_rl" / "first"
    here = reader.project if "runs/cpu" in block.text or block.text.startswith("git") else results
    done = subprocess.run(
        ["bash", "-euc", block.text],
        check=False,
        cwd=here,
        env=reader._environment({}),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize("page", GUIDE)
def test_a_page_begins_with_what_one_types(page: str) -> None:
    """Goal: code before prose: a command or a config, and what it prints. Red with a page that explains first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = blocks_of(page, text)
    first = blocks[0]
    before = [
        line
        for line in text.splitlines()[: first.line - 2]
        if line.strip() and not line.startswith("#")
    ]
    assert len(" ".join(before).split()) <= 25, before
    assert first.language in ("sh", "python", "jsonl"), first
    assert "output" in [block.language for block in blocks[1:4]]
