"""Read rows: from a .jsonl file, a local directory laid out as on the hub, or the hub.

Effects: disk, and the network for hub names (unless HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set).
`rollouts/data_formats` decides what a row means.
"""

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rollouts.data_formats.row import DataError, Row
from rollouts.training.datasets.plain import NotPlain, parse_json, to_plain, without_padding
from rollouts.training.datasets.selection import Selection

HUB_ALIASES = {"gsm8k": "openai/gsm8k"}  # the name in papers
ALL = Selection()


def read_rows(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    selection: Selection = ALL,
    streaming: bool = False,
    array_column: str | None = None,
) -> list[Row]:
    """Return the selected rows of one split, in the selection's order.

    A .jsonl file is one split: `split` only labels it, and `subset` has no effect. `streaming` pulls rows one by one
    and stops at the last one needed; otherwise the whole split is fetched and, from the hub, cached. With
    `array_column` each line of a .jsonl file is a JSON array, which becomes that column. Raises DataError for a name
    that does not exist, a line that cannot be read, an unknown split or subset, and for no rows at all.
    """
    if problem := selection.problem():
        raise DataError(f"{name}: {problem}")
    files = _local_files(name, split, subset)
    if files and all(_is_lines(file) for file in files):
        rows = _select_lines(_read_lines(files, array_column), selection, streaming)
    else:
        where = _places(f"{name}[{split}]", files)
        rows = _read_with_datasets(name, split, subset, selection, streaming, where=where)
    if not rows:
        raise DataError(f"{name}: no rows in {selection} of split {split!r}")
    return rows


def _local_files(name: str, split: str, subset: str | None) -> list[Path]:
    """Return the files of a name: itself, or those that `datasets` resolves for a directory's split. [] on the hub."""
    path = Path(name)
    if _is_lines(path) and not path.is_dir():
        if subset is not None:
            raise DataError(
                f"{name}: subset={subset!r}, but a .jsonl file has no subsets; needs None"
            )
        return [path]
    if path.is_file():
        raise DataError(f"{name}: is a file of a kind that is not read directly. {_KINDS}")
    if not path.is_dir():
        if path.suffix.lower() in _FILE_ENDINGS:
            raise DataError(f"{name}: no such file (looked in {Path.cwd()}). {_KINDS}")
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise DataError(f"{name}: no such directory (looked in {Path.cwd()}), and not a hub id")
        return []
    import datasets

    with _errors_named(name, split, subset):
        splits = datasets.load_dataset_builder(name, name=subset).config.data_files or {}
        if split not in splits:
            raise ValueError(f"unknown split; there is {', '.join(map(str, splits)) or 'none'}")
        return [Path(file) for file in splits[split]]


_FILE_ENDINGS = (
    ".json",
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zst",
    ".xz",
    ".zip",
)
_KINDS = (
    "Needed: a .jsonl file, a directory laid out as on the hub (parquet, json, csv, also compressed; "
    "data/train.parquet), or a hub id. Fix: put the file into a directory, named after its split, and name that."
)


def _is_lines(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


# --- lines ----------------------------------------------------------------------------------------------------------


def _read_lines(files: Sequence[Path], array_column: str | None) -> Iterator[Row]:
    """Yield rows in the files' order; blank lines are skipped.

    Parsed here, not by the loader of `datasets`: that one names no line, turns strings that look like dates into
    timestamps, gives every message the keys of all others, and caches.
    """
    for path in files:
        try:
            # without a byte order mark
            with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
                for number, line in enumerate(lines, start=1):
                    _refuse_other_encodings(line, path, number)
                    if line.strip():
                        yield Row(
                            f"{path}:{number}", _parse_line(line, f"{path}:{number}", array_column)
                        )
        except FileNotFoundError:
            raise DataError(f"{path}: no such file (looked in {Path.cwd()})") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None


def _refuse_other_encodings(line: str, path: Path, number: int) -> None:
    """Raise DataError for bytes that are not UTF-8; "surrogateescape" has turned them into half surrogates."""
    if not line.isascii():
        wrong = next((at for at, char in enumerate(line) if "\udc80" <= char <= "\udcff"), None)
        if wrong is not None:
            byte = ord(line[wrong]) - 0xDC00
            raise DataError(
                f"{path}: cannot be read as UTF-8 text: {path}:{number} has the byte 0x{byte:02x} at character "
                f"{wrong + 1}. Fix: convert the file (iconv -t UTF-8)"
            )


def _parse_line(line: str, where: str, array_column: str | None) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except NotPlain as error:
        raise DataError(f"{where}: {error}: {_shorten(line)}") from None
    found = f"per line, found {type(value).__name__}: {_shorten(line)}"
    if array_column is not None:
        if not isinstance(value, list):
            raise DataError(f"{where}: needs one JSON array of {array_column} {found}")
        return {array_column: value}
    if not isinstance(value, dict):
        raise DataError(f"{where}: needs one JSON object {found}")
    return {key: item for key, item in value.items() if item is not None}


def _select_lines(rows: Iterator[Row], selection: Selection, streaming: bool) -> list[Row]:
    if streaming or selection.shuffle_seed is None:
        return list(selection.of_stream(rows))
    everything = list(rows)
    return [everything[index] for index in selection.of(len(everything))]


# --- everything else, by `datasets` ---------------------------------------------------------------------------------


def _read_with_datasets(
    name: str,
    split: str,
    subset: str | None,
    selection: Selection,
    streaming: bool,
    *,
    where: Callable[[int], str],
) -> list[Row]:
    import datasets

    source = name if Path(name).is_dir() else HUB_ALIASES.get(name, name)
    with _no_progress_bars(), _errors_named(name, split, subset):
        dataset = datasets.load_dataset(source, name=subset, split=split, streaming=streaming)
        chosen: Iterable[tuple[int, dict[str, Any]]]
        if streaming:
            chosen = selection.of_stream(enumerate(dataset))
        else:
            indices = selection.of(len(dataset))
            chosen = zip(indices, dataset.select(indices), strict=True)
        return [Row(where(index), _plain_values(values, where(index))) for index, values in chosen]


def _plain_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row of Arrow's as plain data, without the keys that Arrow filled with null. Raises DataError."""
    try:
        return without_padding(to_plain(values))
    except NotPlain as error:
        raise DataError(f"{where}: {error}") from None


def _places(label: str, files: Sequence[Path]) -> Callable[[int], str]:
    """Return a function that names row `index` of a split: by file and row if the files are parquet, else by count."""
    if not files or any(file.suffix != ".parquet" for file in files):
        return lambda index: f"{label} row {index}"
    ends = list(itertools.accumulate(_parquet_rows(file) for file in files))

    def where(index: int) -> str:
        file = bisect.bisect_right(ends, index)
        return f"{files[file]} row {index - (ends[file - 1] if file else 0)}"

    return where


def _parquet_rows(file: Path) -> int:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {error}") from None


@contextlib.contextmanager
def _errors_named(name: str, split: str, subset: str | None) -> Iterator[None]:
    """Turn what `datasets` raises into a DataError with the data set, the cause and the fix."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # the loader raises a dozen unrelated kinds (HTTP, Arrow, pickling, its own)
        from datasets import config

        kind, fix = (
            "hub data set",
            "check the name, split, subset, network, HF_TOKEN (no directory here has that name)",
        )
        if Path(name).is_dir():
            kind, fix = "directory", "check split and subset"
            if "load_from_disk" in str(error):
                fix = "write it with to_parquet or to_json, into files that are named after their split"
            elif "Arrow type" in str(error):
                fix = "leave the column of that type out, or store it as text"
        elif config.HF_HUB_OFFLINE:
            fix = "fetch it once without HF_DATASETS_OFFLINE and HF_HUB_OFFLINE, or name a local directory"
        reason = _reason(error)[:600]
        raise DataError(
            f"{name}: cannot read split {split!r}, subset {subset!r} of this {kind}: {reason}. Fix: {fix}."
        ) from error


def _reason(error: BaseException) -> str:
    """Return the messages of an exception and of its causes: the loader's is only "An error occurred"."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(" ".join(str(cause).split()).rstrip(".") or type(cause).__name__)
        cause = cause.__cause__
    return ": ".join(dict.fromkeys(texts))


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    were_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def _shorten(text: str, limit: int = 120) -> str:
    text = text.strip()
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
