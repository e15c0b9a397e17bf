"""What the server holds: the source of runs, what was read of them last, and the indexes of their samples."""

import contextlib
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts.run_dir import RunDir
from rollouts.view.chart_bundle import bundle_file, javascript
from rollouts.view.growing_rows import GrowingRows
from rollouts.view.run_data import NotARunError, RunData, read_run
from rollouts.view.ui.run_source import ConfigBuilder, PageError, RunSource
from rollouts.view.ui.sample_index import Head, cache_of, read_columns, read_head, update
from rollouts.view.ui.sample_query import Samples

RUNS_KEPT = 6  # of which the records stay in memory
INDEXES_KEPT = 2
FIRST_S = 0.1  # a run that was not looked at before: its first samples are indexed while one waits
RETRY_S = 30.0  # after an index could not be made: a full disk, say
WATCHED = (
    "config.json",
    "status.json",
    "events.jsonl",
    "metrics.jsonl",
    "eval.jsonl",
    "eval_samples.jsonl",
)


def signature(path: Path, names: tuple[str, ...] = WATCHED) -> tuple[tuple[int, int], ...]:
    """Return sizes and times of files: another one means that something was written. (0, 0) for a missing file."""
    found = []
    for name in names:
        try:
            about = (path / name).stat()
            found.append((about.st_size, about.st_mtime_ns))
        except OSError:
            found.append((0, 0))
    return tuple(found)


def _usage_files(path: Path) -> list[str]:
    """Return the names of what tells how busy the run's hosts are."""
    others = sorted(path.glob("hosts/[0-9]*/gpu.jsonl"))
    return ["gpu.jsonl", *(other.relative_to(path).as_posix() for other in others)]


@dataclass
class IndexedSamples:
    """The samples of one run as far as they are indexed, and how far that is."""

    file: Path
    samples: Samples
    head: Head
    total: int  # bytes of the file
    building: bool
    failed: bool = False  # the process that makes it ended with an error


@dataclass
class Desk:
    """All that the pages are made from. Its methods are called from several threads."""

    source: RunSource
    builder: ConfigBuilder
    is_ending: Callable[[], bool] = lambda: False
    _runs: "OrderedDict[Path, tuple[Any, RunData, GrowingRows]]" = field(
        default_factory=OrderedDict
    )
    _indexes: "OrderedDict[Path, tuple[Head, Samples]]" = field(default_factory=OrderedDict)
    _builders: dict[Path, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _failed_at: dict[Path, float] = field(default_factory=dict)
    _bundler: "subprocess.Popen[bytes] | None" = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def warm(self) -> None:
        """Begin with what the first page would wait for: the charts' script, in a process beside; slow modules."""
        if not bundle_file().exists():
            self._bundler = _beside(
                "-c", "from rollouts.view.chart_bundle import javascript as make; make()"
            )
        threading.Thread(target=_import_slow_modules, daemon=True).start()

    def vega(self) -> str:
        """Return the charts' script."""
        if self._bundler is not None:
            self._bundler.wait()
        return javascript()

    def run(self, run_id: str) -> RunData:
        """Return what a run's files say now; it reads them where they have changed. Raises PageError."""
        path = self.source.directory(run_id)
        with self._lock:
            seen = signature(path, (*WATCHED, *_usage_files(path)))
            kept = self._runs.get(path)
            if kept is None or kept[0] != seen:
                growing = kept[2] if kept else GrowingRows()
                try:
                    kept = (seen, read_run(path, growing), growing)
                except NotARunError as error:
                    self._runs.pop(path, None)
                    raise PageError(
                        f"{error}. Was it removed? The list of runs shows what is here."
                    ) from None
                self._runs[path] = kept
                while len(self._runs) > RUNS_KEPT:
                    self._runs.popitem(last=False)
            self._runs.move_to_end(path)
            return kept[1]

    def samples(self, run_id: str) -> IndexedSamples:
        """Return a run's samples as far as they are indexed; what is missing is being indexed from now on."""
        file = RunDir(self.source.directory(run_id)).rollouts
        with self._lock:
            try:
                total = file.stat().st_size
            except OSError:
                if not file.parent.is_dir():
                    raise PageError(f"{file.parent} is gone: the run was removed.") from None
                return IndexedSamples(file, _none(), Head(), 0, building=False)
            building = self._is_building(file)
            failed = time.monotonic() - self._failed_at.get(file, -RETRY_S) < RETRY_S
            head, samples = self._loaded(file, building)
            if not (building or failed or head.bytes):
                with contextlib.suppress(OSError):  # the builder meets it too, and is told of
                    update(file, cache_of(file), seconds=FIRST_S)
                head, samples = self._loaded(file, building)
            if not (building or failed) and _ends_whole(file, head.bytes, total):
                self._build(file)
                building = True
            return IndexedSamples(file, samples, head, total, building, failed)

    def _loaded(self, file: Path, building: bool) -> tuple[Head, Samples]:
        """Return the newest index that fits its file; an empty one where none does.

        While one is being made, the columns are read again where a tenth has come: else each look would read them.
        """
        cache = cache_of(file)
        head = read_head(cache, file)
        kept = self._indexes.get(file)
        if head is None:
            self._indexes.pop(file, None)
            return Head(), _none()
        if kept and building and 0 <= head.records - kept[0].records < kept[0].records / 10:
            head = kept[0]
        if kept is None or kept[0] != head:
            columns = read_columns(cache, head)
            if columns is None:
                return Head(), _none()  # the builder finds the same, and makes it anew
            kept = (head, Samples(columns, head.finish))
            self._indexes[file] = kept
            while len(self._indexes) > INDEXES_KEPT:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(file)
        return kept

    def _is_building(self, file: Path) -> bool:
        builder = self._builders.get(file)
        if builder is None or builder.poll() is None:
            return builder is not None
        if self._builders.pop(file).returncode:
            self._failed_at[file] = time.monotonic()
        return False

    def _build(self, file: Path) -> None:
        self._builders[file] = _beside("-m", "rollouts.view.ui.sample_index", str(file))

    def close(self) -> None:
        """End what works in the background."""
        self.source.close()
        with self._lock:
            for process in (*self._builders.values(), *filter(None, [self._bundler])):
                process.kill()
                process.wait()


def _beside(*arguments: str) -> "subprocess.Popen[bytes]":
    """Start a Python beside the server, where its work and its memory slow no page."""
    root, quiet = Path(__file__).resolve().parents[3], subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=root, stdin=quiet, stdout=quiet, stderr=quiet
    )


def _import_slow_modules() -> None:
    import numpy  # noqa: F401
    import altair  # noqa: F401  # isort: skip


def _ends_whole(file: Path, begin: int, end: int) -> bool:
    """Return whether a line ends between two places: else there is nothing to index yet."""
    if begin >= end:
        return False
    from rollouts.plain_files import reading

    try:
        with reading(file) as stream:
            stream.seek(max(begin, end - (1 << 20)))
            return b"\n" in stream.read(1 << 20)
    except OSError:
        return False


def _none() -> Samples:
    import numpy

    from rollouts.view.ui.sample_index import COLUMNS

    return Samples({name: numpy.empty(0, kind) for name, kind in COLUMNS.items()}, ())
