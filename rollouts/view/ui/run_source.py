"""What the page asks of the rest: which runs there are, and where their files lie. Implemented by rollouts.remote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rollouts.view.charts import RunGroup
from rollouts.view.run_data import RunData
from rollouts.view.run_report import ConfigDifference


class PageError(Exception):
    """Something that was asked for cannot be shown. The message says what, and what to do."""

    def __init__(self, message: str, *, status: int = 404) -> None:
        super().__init__(message)
        self.status = status  # of HTTP


@dataclass(frozen=True)
class RunList:
    """The runs that are known, newest first, each as `deploy ls` shows it with its `tags`."""

    rows: Sequence[Mapping[str, Any]]
    remarks: Sequence[str]  # what could not be read


class RunSource(Protocol):
    """Where runs come from: this machine's registry, or a host's list."""

    @property
    def title(self) -> str:
        """Return what the list is of: "this machine", or a host's name."""
        ...

    def runs(self) -> RunList:
        """Return all runs, as they are now. Raises PageError."""
        ...

    def row(self, run_id: str) -> Mapping[str, Any] | None:
        """Return one run as `runs` lists it, seconds old at most; None for no such run."""
        ...

    def directory(self, run_id: str) -> Path:
        """Return where a run's files lie here, and keep them current from now on. Raises PageError for no such run."""
        ...

    def remark(self, run_id: str) -> str:
        """Return what one needs to know about how current a run's files are; "" for nothing."""
        ...

    def grouped(self, runs: Sequence[RunData]) -> list[RunGroup]:
        """Put runs together that differ in their seeds alone."""
        ...

    def difference(self, first: RunData, second: RunData) -> ConfigDifference:
        """Return where the configs and the code of two runs differ."""
        ...

    def close(self) -> None:
        """Stop following runs. Returns at once."""
        ...


class ConfigBuilder(Protocol):
    """Makes configs out of others. Settings are `path=value`, each value as a config file writes it."""

    @property
    def target(self) -> str:
        """Return where a run would start."""
        ...

    def bases(self) -> list[str]:
        """Return what one may begin from."""
        ...

    def fields(self, base: str) -> dict[str, Any]:
        """Return every field of a config with its value and what it means. Raises PageError."""
        ...

    def checked(
        self, base: str, settings: Sequence[str], *, gpu_memory_gib: float, other: str
    ) -> dict[str, Any]:
        """Return a config's problems, memory and file, and how it differs from another. Raises PageError."""
        ...

    def write(self, base: str, settings: Sequence[str], name: str) -> dict[str, Any]:
        """Write the config as a file. Raises PageError."""
        ...

    def run(self, name: str, *, start: bool) -> dict[str, Any]:
        """Return what a launch of a written file would do, or start it. Raises PageError."""
        ...
