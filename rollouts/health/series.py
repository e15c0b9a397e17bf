"""A run's records as the rules see them: from a directory that is read once, or from files that still grow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Series:
    """One number of one stage, over its steps. The three are equally long; steps increase."""

    stage: str
    name: str
    steps: Sequence[int] = ()
    times: Sequence[float] = ()  # seconds since the epoch
    values: Sequence[float] = ()


class Records(Protocol):
    """What a run has recorded so far."""

    @property
    def stages(self) -> Sequence[str]:
        """Return the stages that logged a step."""
        ...

    @property
    def evaluations(self) -> Sequence[Mapping[str, Any]]:
        """Return the usable rows of eval.jsonl."""
        ...

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """Return the usable rows of events.jsonl."""
        ...

    @property
    def usage(self) -> Sequence[Mapping[str, Any]]:
        """Return the usable rows of gpu.jsonl, or the last of them."""
        ...

    def series(self, stage: str, name: str) -> Series:
        """Return a metric of a stage; one without points where no step logged it."""
        ...
