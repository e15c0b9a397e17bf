"""`deploy` from Python: launch runs, wait for them, read what they logged. No torch.

    from rollouts.api import deploy, runs

    run = deploy(config, remote="user@gpu-host")  # returns once it is launched
    run.wait()  # "done"
    run.metrics(stage="rl")[-1]["reward_mean"]

A notebook may be closed: the run goes on, and `runs()` finds it again. Paths of the config are relative to the
repository that the working directory is in, as for the command.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.remote import commands, looks
from rollouts.remote.errors import DeployError
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.queue_options import queue_wish
from rollouts.remote.read_config import read_config
from rollouts.remote.rented_host import instead_of
from rollouts.remote.run import registry
from rollouts.remote.run.run_names import known_run
from rollouts.remote.run.wanted import EVERYTHING
from rollouts.remote.several_hosts import StartOptions, start_on
from rollouts.remote.texts import how_to_go_on
from rollouts.run_dir import RunDir, iter_jsonl
from rollouts.view.screen import Screen

__all__ = ["DeployError", "Run", "deploy", "find", "runs"]


@dataclass(frozen=True)
class Run:
    """A run that this machine knows."""

    run_id: str
    target: str  # "local", or what `remote` said
    directory: (
        Path  # its results here, filled while somebody follows the run: `wait`, or `deploy attach`
    )

    @property
    def config(self) -> Config:
        """The config that it was started with."""
        return registry.planned(known_run(self.run_id))

    def status(self) -> dict[str, Any]:
        """Ask the host: {"state", "stage", "step", "message", "exit_code", …}. Raises DeployError."""
        with _unseen():
            return dict(looks.status(self.run_id, remote=None).document)

    def wait(self) -> str:
        """Follow the run to its end, pull its results, and return its state: "done", "failed", "stopped" or "died".

        Ctrl-C raises KeyboardInterrupt, and the run goes on: what attaches to it or stops it is printed to stderr.
        Raises DeployError where the host cannot be reached.
        """
        with _unseen(), contextlib.suppress(SystemExit):
            commands.attach(
                self.run_id, Screen(as_json=True), remote=None, accept_new_host_key=False
            )
            return str(self.status()["state"])
        how = f"find({self.run_id!r}).wait() follows it again, .stop() ends it; in a terminal:"
        Screen(as_json=False).remark(f"{how} {how_to_go_on(known_run(self.run_id))}")
        raise KeyboardInterrupt

    def stop(self) -> None:
        """End its processes; its results stay. Raises DeployError."""
        with _unseen():
            commands.stop(self.run_id, remote=None)

    def pull(self) -> None:
        """Bring all results here, verified. Raises DeployError."""
        with _unseen():
            commands.pull_run(self.run_id, Screen(as_json=True), remote=None)

    def metrics(self, *, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl that are here: {"stage", "step", "time", …} a logged step."""
        return self._rows("metrics.jsonl", stage)

    def evaluations(self, *, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of eval.jsonl that are here: {"stage", "step", "split", "task", "metric", "value"}."""
        return self._rows("eval.jsonl", stage)

    def events(self) -> list[dict[str, Any]]:
        """Return the rows of events.jsonl that are here: {"time", "kind", …}."""
        return self._rows("events.jsonl", None)

    def frame(self, *, stage: str | None = None) -> Any:
        """Return `metrics` as a pandas DataFrame. Raises DeployError where pandas is missing."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise DeployError(
                f"{error.name} is not installed: frame() needs it.",
                fix="pip install pandas; metrics() returns the same rows as a list without it",
            ) from None
        return pandas.DataFrame(self.metrics(stage=stage))

    def _rows(self, name: str, stage: str | None) -> list[dict[str, Any]]:
        rows = iter_jsonl(self.directory / name)
        return [row for row in rows if stage is None or row.get("stage") == stage]


def deploy(
    config: Config | str | Path,
    *,
    remote: str | Sequence[str] | None = None,
    run_id: str | None = None,
    busy_ok: bool = False,
    wait: bool = False,
    accept_new_host_key: bool = False,
) -> Run:
    """Launch a job, or a config file's, on this machine or on the `remote` that `ssh` knows; return the run.

    `remote`: several for a job of several hosts, the first leads. `wait`: it waits in the host's queue until GPUs and
    ports are free. Raises DeployError with every reason where it cannot start; nothing was started then.
    """
    if not isinstance(config, Config):
        config = read_config(str(config))
    if problems := config.problems():
        raise DeployError(f"{len(problems)} problem(s) in the config.", found="\n".join(problems))
    name = run_id or commands.new_run_id(config)
    targets = [remote] if isinstance(remote, str) else list(remote or ())
    wish = queue_wish(wait=wait, queue=False, at_once=None, busy_ok=busy_ok)
    screen, key = Screen(as_json=True), accept_new_host_key
    with _unseen():
        if len(targets) > 1:
            options = StartOptions(name, False, True, key, busy_ok, EVERYTHING, wish)
            start_on(config, screen, [NamedHost(target) for target in targets], options)
        else:
            commands.start(
                config,
                screen,
                remote=targets[0] if targets else None,
                run_id=name,
                accept_new_host_key=key,
                busy_ok=busy_ok,
                detach=True,
                queue=wish,
            )
    return find(name)


def find(name: str) -> Run:
    """Return the run of this name, the one whose name begins so, or the newest for "last". Raises DeployError."""
    return _run(known_run(name))


def runs() -> list[Run]:
    """Return the runs that this machine knows, the oldest first."""
    return [_run(entry) for entry in registry.entries()]


def _run(entry: registry.RunEntry) -> Run:
    return Run(entry.run_id, entry.target, RunDir(Path(entry.local_dir)).path)


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Keep what the commands print out of the notebook; errors come as exceptions, as the commands tell them."""
    try:
        with contextlib.redirect_stdout(_Nowhere()):
            yield
    except DeployError as error:
        raise instead_of(error) from None
