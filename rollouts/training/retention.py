"""Which checkpoints stay, and the removal of the others."""

import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `keep_last` (-1: all), and the best by a metric that they were saved with.

    `latest` and what a run resumed from always stay. `on_remove(path)` is called on rank 0 before one goes.
    """

    keep_last: int = -1
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    on_remove: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        if self.keep_last != -1 and self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last}: needs >= 1, or -1 to keep all")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode={self.best_mode!r}: needs 'min' or 'max'")


def expired(
    found: Sequence[tuple[Path, Mapping[str, Any]]],
    retention: Retention,
    protected: Collection[Path],
) -> list[Path]:
    """Return which of the checkpoints `found`, (directory, metrics) in the order of their steps, may go. Pure."""
    if retention.keep_last == -1:
        return []
    kept = {path for path, _ in found[-retention.keep_last :]} | set(protected)
    values = [(metrics.get(retention.best_metric or ""), path) for path, metrics in found]
    numbers = [
        (value, path)
        for value, path in values
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    if numbers:
        best = (min if retention.best_mode == "min" else max)(value for value, _ in numbers)
        # of equals the last
        kept.add(next(path for value, path in reversed(numbers) if value == best))
    return [path for path, _ in found if path not in kept]


def remove_expired(
    found: Sequence[tuple[Path, Mapping[str, Any]]],
    latest: Path,
    retention: Retention,
    protected: Collection[Path],
) -> None:
    """Remove the checkpoints that `expired` names; `latest` and `protected` stay."""
    metrics = {path.resolve(): saved for path, saved in found}
    latest = latest.resolve()
    if retention.best_metric is not None and retention.best_metric not in metrics[latest]:
        logger.warning(
            "%s was saved without the metric %r, so it cannot be kept as the best; it has: %s",
            *(latest, retention.best_metric, ", ".join(metrics[latest])),
        )
    own_names = {path.resolve(): path for path, _ in found}
    keep = {latest, *(path.resolve() for path in protected)}
    for path in expired(list(metrics.items()), retention, keep):
        if retention.on_remove is not None:
            retention.on_remove(own_names[path])
        # never half a checkpoint under its name
        going = path.with_name(f".tmp-removed-{path.name}")
        path.rename(going)
        shutil.rmtree(going)
