"""Where metrics go: JSON Lines, Weights & Biases, or several at once. One flat dict of scalars per logged step."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol


class MetricsLogger(Protocol):
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record `metrics` for optimizer step `step`; returns once they are handed on."""

    def finish(self) -> None:
        """Write out what is pending and close; nothing may be logged afterwards."""


class JSONLLogger:
    """One JSON object a line, appended: `{"step", "time", constants…, metrics…}`; time is seconds since the epoch, UTC.

    `path` is a directory, in which `metrics.jsonl` is written, or the file itself where it ends in `.jsonl`.
    `constants` are written into every line (`stage="rl"`). Each line is one write, so a reader that follows the file
    sees whole lines; what a killed writer left torn is closed off by a newline, and of a line that a full disk cut
    short nothing stays. Numbers that JSON has no word for (NaN, infinities) become null.
    """

    def __init__(self, path: Path | str, **constants: Any) -> None:
        path = Path(path)
        self.path = path if path.suffix == ".jsonl" else path / "metrics.jsonl"
        self._constants = constants
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+", buffering=0)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if self._file.closed:
            raise ValueError(
                f"{self.path}: logged after finish(); open a new JSONLLogger to append"
            )
        fixed = {"step": step, "time": round(time.time(), 3), **self._constants}
        _append(self._file, _json({**fixed, **metrics, **fixed}).encode() + b"\n")

    def finish(self) -> None:
        self._file.close()


class WandbLogger:
    """Metrics to a Weights & Biases run. Needs the `wandb` extra; it is imported only here.

    `group` joins the runs of a job's stages; W&B's own files go to `directory`/wandb, not to the working directory.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        group: str | None = None,
        directory: Path | str | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "WandbLogger needs wandb: pip install 'rollouts[wandb]', or set use_wandb=False"
            ) from error
        if group is not None:
            os.environ["WANDB_RUN_GROUP"] = group
        if directory is not None:
            os.environ["WANDB_DIR"] = str(directory)
        self._wandb = wandb
        self._run = wandb.init(project=project, name=name, config=dict(config or {}))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._run.log({**metrics, "step": step}, step=step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show `rows`, all of the same keys, as a table of the run."""
        if rows:
            columns = [_column([row[key] for row in rows]) for key in rows[0]]
            data = [list(row) for row in zip(*columns, strict=True)]
            self._run.log({name: self._wandb.Table(columns=list(rows[0]), data=data)}, step=step)

    def finish(self) -> None:
        self._run.finish()


class CompositeLogger:
    """Every record to each of `loggers`, in order. `finish` reaches all of them, then raises what any raised."""

    def __init__(self, loggers: Sequence[MetricsLogger]) -> None:
        self._loggers = list(loggers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step=step)

    def finish(self) -> None:
        errors = []
        for logger in self._loggers:
            try:
                logger.finish()
            except Exception as error:  # whatever one raises, the others must still be closed; all are raised below
                errors.append(error)
        if errors:
            raise ExceptionGroup("metrics loggers failed to finish", errors)


def _column(values: Sequence[Any]) -> list[Any]:
    """Return a table's column: values of one type, as W&B wants it (None fits each); of several types all as text."""
    cells = [
        v if isinstance(v, (str, int, float)) or v is None else json.dumps(v, default=str)
        for v in values
    ]
    kinds = {float if type(cell) is int else type(cell) for cell in cells if cell is not None}
    if len(kinds) < 2:
        return cells
    return [cell if isinstance(cell, str) or cell is None else json.dumps(cell) for cell in cells]


def _append(file: FileIO, data: bytes) -> None:
    """Write all of `data` on a line of its own, or nothing. Raises OSError."""
    begin = os.fstat(file.fileno()).st_size
    torn = begin > 0 and os.pread(file.fileno(), 1, begin - 1) != b"\n"
    data = b"\n" + data if torn else data
    try:
        while data:  # a regular file takes it in one call unless the disk is full
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):  # no regular file: the first error is the one to tell
            file.truncate(begin)
        raise


def json_text(record: Mapping[str, Any], **options: Any) -> str:
    """Return `record` as JSON, numbers that JSON has no word for (NaN, infinities) as null."""
    return json.dumps(
        {key: _plain(key, value) for key, value in record.items()}, allow_nan=False, **options
    )


def _json(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, allow_nan=False)
    except (TypeError, ValueError):
        # something JSON cannot hold as it stands: the slower way, value by value
        return json.dumps({key: _plain(key, value) for key, value in record.items()})


def _plain(key: str, value: Any) -> Any:
    """Return `value` as JSON can hold it. Raises TypeError naming `key`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return _plain(key, value.item())  # a scalar of torch or numpy
    raise TypeError(
        f"metric {key}={value!r} ({type(value).__name__}): needs a number, text, or lists and dicts of those"
    )
