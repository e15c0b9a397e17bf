"""Builders: each turns one section of the config into the library's objects. Nothing trains here.

This file stays light: the trainer reads it before anything loads torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StageName = Literal["sft", "rl"]


@dataclass(frozen=True)
class EngineUrls:
    """Where the run's inference servers answer."""

    engines: Sequence[str] = ()  # one a replica
    router: str | None = None  # SGLang's, in front of them
    receivers: Sequence[str] = ()  # of weights, one on each other host that has engines
