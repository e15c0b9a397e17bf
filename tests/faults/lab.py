"""A laptop, a host with a real sshd, and a link between them, new for each cell; and what has to hold afterwards."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, observe, read_jsonl, read_status
from tests.remote.conftest import share_environments
from tests.remote.hosts import (
    Host,
    Laptop,
    host,
    keygen,
    kill_tmux,
    make_laptop,
    make_project,
    tool_directory,
    wait_for,
)
from tests.remote.link import Link, link
from tests.remote.test_whole_runs import processes_of

ATTACHES_MAX = 4
END_S = 400.0


@dataclass(frozen=True)
class World:
    """One cell's machines and its run."""

    laptop: Laptop
    host: Host
    link: Link
    target: str
    run_id: str

    @property
    def there(self) -> RunDir:
        return RunDir(self.host.run_path(self.run_id))

    @property
    def here(self) -> RunDir:
        return RunDir(self.laptop.project / "runs/example" / self.run_id)


def make_shared(directory: Path) -> Path:
    """Make what all cells share: a key, the tools, the project, environments that were built once."""
    keygen(directory / "key")
    tool_directory(directory / "bin")
    (directory / "envs").mkdir()
    make_project(directory / "project")
    return directory


@contextlib.contextmanager
def world(shared: Path, directory: Path, run_id: str, *, delay_s: float = 0.0) -> Iterator[World]:
    """Yield a fresh laptop, host and link; all that they started is ended afterwards."""
    directory.mkdir(parents=True)
    project = Path(shutil.copytree(shared / "project", directory / "project", symlinks=True))
    tmux_dir = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    laptop = make_laptop(directory / "laptop", project, tmux_dir)
    for name in ("", ".pub"):
        shutil.copy(f"{shared}/key{name}", f"{laptop.key}{name}")
    try:
        with (
            host(directory / "host", shared / "key", path=shared / "bin") as there,
            link(there.port, delay_s=delay_s) as way,
        ):
            share_environments(there.home, shared)
            laptop.know(there)
            yield World(laptop, there, way, laptop.know_by(there, way.port), run_id)
    finally:
        kill_tmux(tmux_dir)


def check_end(made: World, codes: list[int], *, survives: bool) -> str:
    """Hold that nothing was lost, doubled, left or wrongly called a success. Returns the run's end.

    `codes`: those of every command that followed the run to its end. `survives`: the fault may not end the run.
    """
    wait_for(lambda: not processes_of(made.run_id), "the end of the run's processes")
    state = observe(made.there).state
    assert (codes[-1] == 0) == (state == "done"), f"reported {codes}, was {state}"
    assert not survives or state == "done", f"the run was lost: {state}"
    for name in ("events.jsonl", "metrics.jsonl", "eval.jsonl", "logs/trainer.log", "logs/supervisor.log"):
        theirs = made.there.path / name
        if theirs.exists():
            assert (made.here.path / name).read_bytes() == theirs.read_bytes(), f"{name} differs"
    steps = [(row["stage"], row["step"]) for row in read_jsonl(made.here.metrics)]
    assert len(steps) == len(set(steps)), "a step twice"
    for directory in made.here.checkpoints.glob("*/step_*"):
        assert manifest_problems(directory) == (), f"{directory.name} is half-written"
    if state == "done":
        named = {row["path"] for row in read_jsonl(made.there.events) if row["kind"] == "checkpoint"}
        assert all((made.here.path / path).is_dir() for path in named), "a checkpoint is missing"
    return state


def follow_to_end(made: World) -> list[int]:
    """Attach until the run is at its end, as its user would; the exit codes."""
    codes = []
    for _ in range(ATTACHES_MAX):
        done = made.laptop.deploy("attach", made.run_id, timeout_s=END_S)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        codes.append(done.returncode)
        status = read_status(made.there)
        if done.returncode == 0 or (status and status.state in ("failed", "stopped")) or "died" in done.stdout:
            return codes
    raise AssertionError(f"no end after {ATTACHES_MAX} times attach: {codes}\n{done.stdout}\n{done.stderr}")
