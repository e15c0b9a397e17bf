"""The shell blocks and the table of verbs of README.md, run as they stand: real bash, deploy, sshd, tmux and rsync.

A host of the test stands in for `user@host`, a job without torch for the config that is named, its run for RUN.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.docs_blocks import ROOT, Block, blocks_of, spoken_commands
from tests.remote.hosts import Host, Laptop, git, write_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [block for block in blocks_of("README.md", README) if block.language == "sh"]
TREE = next(
    block for block in blocks_of("README.md", README) if block.text.startswith("config.json")
)
RUN_BLOCK, CLONE_BLOCK, HOST_BLOCK = range(3)


def run_block(
    block: Block, laptop: Laptop, cwd: Path, target: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    """The block's lines in one bash that ends at the first error, with `deploy` on its PATH."""
    text = re.sub(r"user@(gpu-host|host:port|host)", target, block.text)
    for old, new in changes.items():
        text = text.replace(f"<{old.replace('_', ' ')}>", new)
    bin_directory = laptop.home / "bin"
    bin_directory.mkdir(exist_ok=True)
    command = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {ROOT / "deploy.py"} "$@"\n'
    (bin_directory / "deploy").write_text(command)
    (bin_directory / "deploy").chmod(0o755)
    environment = laptop._environment({})
    environment["PATH"] = f"{bin_directory}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-euc", text],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def with_config(laptop: Laptop) -> None:
    """The config that the page names, as a job of this host's."""
    saved = write_config(laptop.project, "named", output__experiment_name="named")
    file = laptop.project / "configs" / "01_debug_sft_rl.py"
    file.write_text(f"from base_config import load_config\nconfig = load_config({str(saved)!r})\n")
    git(laptop.project, "add", "-A")
    git(laptop.project, "commit", "-qm", "config")


def test_the_commands_of_the_readme_run(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: each line that people copy works, and leaves what the page says. Red with an option that deploy does not
    have."""
    assert len(SHELL) == 3, "a new block needs a line here"
    target = make_host().target
    with_config(laptop)
    first, last = SHELL[RUN_BLOCK].text, SHELL[HOST_BLOCK].text.splitlines()[-1]
    assert first == last.replace("01_debug_sft_rl", "00_cpu_sft_rl").replace(
        "user@host", "user@gpu-host"
    )  # run below
    done = run_block(SHELL[HOST_BLOCK], laptop, laptop.project, target)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    (row,) = laptop.json("ls")
    run_id = row["run_id"]
    assert row["state"] == "done"
    (mirror,) = laptop.project.glob(f"runs/*/{run_id}")
    for line in TREE.text.splitlines():
        for name in re.findall(r"[\w.]+(?=[ /]|$)", line.split("  ")[0]):
            written = (
                mirror / name
                if name not in ("sft", "rl", "step_000100")
                else mirror / "checkpoints"
            )
            # the stand-in trainer samples nothing
            unmade = "rollouts.jsonl", "eval_samples.jsonl"
            assert written.exists() or name in unmade, name
    verbs = [
        words for words in spoken_commands(README.split("| command | does |")[1].split("\n\n")[0])
    ]
    assert [words[1] for words in verbs[1:]] == [
        "ls",
        "status",
        "logs",
        "attach",
        "stop",
        "pull",
        "forget",
    ]
    for words in verbs[1:]:
        done = laptop.deploy(*[run_id if word == "RUN" else word for word in words[1:]])
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert run_id not in laptop.deploy("ls").stdout


def test_a_clone_runs_the_demo(laptop: Laptop) -> None:
    """Goal: the first two commands of the page: a clone holds what scripts/demo needs, and it gets as far as a plan
    without problems; tests/e2e runs the demo itself. Red with the config's name misspelt in scripts/demo."""
    ready = f"""
profile=base python={shlex.quote(sys.executable)}; ln -s {shlex.quote(sys.executable)} {laptop.home}/python3
mkdir -p .venv/bin; cp "$(command -v deploy)" .venv/bin/deploy
sed -i "s#{ROOT}/deploy.py#$PWD/deploy.py#" .venv/bin/deploy
eval "$(grep '^want=' scripts/setup)"; printf '%s' "$want" > .venv/.setup; PATH={laptop.home}:$PATH
scripts/demo --plan"""
    lines = SHELL[CLONE_BLOCK].text.splitlines()
    assert lines[1:] == ["scripts/setup", "scripts/demo", "scripts/test"]
    block = Block("README.md", 0, "sh", lines[0] + ready, None)
    done = run_block(block, laptop, laptop.home, "", this_repository=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft: " in done.stdout and "rl: " in done.stdout and "making .venv" not in done.stdout
