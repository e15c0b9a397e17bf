"""A laptop, a host with a real sshd, and a link between them, new for each cell; and what has to hold afterwards."""

import contextlib
import shutil
import subprocess
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
from tests.run_processes import processes_of

ATTACHES_MAX = 4
END_S = 400.0
DISK_BYTES = 64_000_000
COMPILER = shutil.which("cc")


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
    if COMPILER is not None:
        source = Path(__file__).with_name("clock.c")
        argv = [COMPILER, "-shared", "-fPIC", "-O1", "-o", str(directory / "clock.so"), str(source)]
        subprocess.run(argv, check=True)
    return directory


@dataclass(frozen=True)
class Setting:
    """What a world has besides: a slow or lossy link, disks that can be filled, clocks that can jump."""

    delay_s: float = 0.0
    loss: float = 0.0
    small_disks: bool = False
    clocks: bool = False


@contextlib.contextmanager
def world(
    shared: Path, directory: Path, run_id: str, setting: Setting = Setting()
) -> Iterator[World]:
    """Yield a fresh laptop, host and link; all that they started is ended afterwards."""
    directory.mkdir(parents=True)
    project = Path(shutil.copytree(shared / "project", directory / "project", symlinks=True))
    tmux_dir = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    laptop = make_laptop(directory / "laptop", project, tmux_dir)
    for name in ("", ".pub"):
        shutil.copy(f"{shared}/key{name}", f"{laptop.key}{name}")
    clock = {name: _clock(shared, directory / f"clock-{name}") for name in ("here", "there")}
    laptop.environment.update(clock["here"] if setting.clocks else {})
    with contextlib.ExitStack() as stack:
        stack.callback(kill_tmux, tmux_dir)
        home = directory / "disk-there" / "home"
        if setting.small_disks:
            stack.enter_context(small_disk(home.parent))
            stack.enter_context(small_disk(project / "runs"))
        there = stack.enter_context(
            host(
                directory / "host",
                shared / "key",
                path=shared / "bin",
                home=home if setting.small_disks else None,
                environment=clock["there"] if setting.clocks else None,
            )
        )
        way = stack.enter_context(link(there.port, delay_s=setting.delay_s, loss=setting.loss))
        share_environments(there.home, shared)
        laptop.know(there)
        yield World(laptop, there, way, laptop.know_by(there, way.port), run_id)


def _clock(shared: Path, file: Path) -> dict[str, str]:
    """Return the variables of processes whose time of day is off by the seconds that `file` says, at any moment."""
    file.write_text("0")
    return {"LD_PRELOAD": str(shared / "clock.so"), "CLOCK_OFFSET_FILE": str(file)}


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a disk of DISK_BYTES at `directory`."""
    directory.mkdir(exist_ok=True)
    size = f"size={DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def check_end(made: World, codes: list[int], *, survives: bool) -> str:
    """Hold that nothing was lost, doubled, left or wrongly called a success. Returns the run's end.

    `codes`: those of every command that followed the run to its end. `survives`: the fault may not end the run.
    """
    wait_for(lambda: not processes_of(made.run_id), "the end of the run's processes")
    state, status = observe(made.there).state, read_status(made.there)
    why = "" if status is None else f": {status.message}"
    assert (codes[-1] == 0) == (state == "done"), f"reported {codes}, was {state}{why}"
    assert not survives or state == "done", f"the run was lost: {state}{why}"
    for name in (
        "events.jsonl",
        "metrics.jsonl",
        "eval.jsonl",
        "logs/trainer.log",
        "logs/supervisor.log",
    ):
        theirs = made.there.path / name
        if theirs.exists():
            assert (made.here.path / name).read_bytes() == theirs.read_bytes(), f"{name} differs"
    steps = [(row["stage"], row["step"]) for row in read_jsonl(made.here.metrics)]
    assert len(steps) == len(set(steps)), "a step twice"
    for directory in made.here.checkpoints.glob("*/step_*"):
        assert manifest_problems(directory) == (), f"{directory.name} is half-written"
    if state == "done":
        named = {
            row["path"] for row in read_jsonl(made.there.events) if row["kind"] == "checkpoint"
        }
        assert all((made.here.path / path).is_dir() for path in named), "a checkpoint is missing"
    return state


def check_said(text: str) -> None:
    """Hold that deploy did not fail itself; the last lines of a trainer, which it shows, are indented."""
    assert not any(line.startswith("Traceback") for line in text.splitlines()), text[-3000:]


def follow_to_end(made: World) -> list[int]:
    """Attach until the run is at its end, as its user would; the exit codes."""
    codes = []
    for _ in range(ATTACHES_MAX):
        done = made.laptop.deploy("attach", made.run_id, timeout_s=END_S)
        check_said(done.stdout + done.stderr)
        codes.append(done.returncode)
        status = read_status(made.there)
        if (
            done.returncode == 0
            or (status and status.state in ("failed", "stopped"))
            or "died" in done.stdout
        ):
            return codes
    raise AssertionError(
        f"no end after {ATTACHES_MAX} times attach: {codes}\n{done.stdout}\n{done.stderr}"
    )
