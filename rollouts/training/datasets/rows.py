"""Read rows out of a .jsonl file, a local directory laid out as on the hub, or the hub: one `datasets.Dataset` each.

Effects: disk, and the network for hub names. What a row means is decided in formats.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_ALIASES = {"gsm8k": "openai/gsm8k"}  # the name papers use


class DataError(ValueError):
    """Data that cannot be used. The message names the file and line (or data set and row), the value and the need."""


@dataclass(frozen=True)
class Row:
    where: str  # "train.jsonl:17", or "openai/gsm8k[train] row 17" (0-based, as datasets counts)
    values: dict[str, Any]  # by column; a column that is null in this row is left out


def read_rows(name: str, *, split: str = "train", subset: str | None = None, max_samples: int = -1) -> list[Row]:
    """The first `max_samples` rows (-1: all) of one split, in file order.

    A .jsonl file is one split: `split` only labels it, and `subset` has no meaning. Raises DataError for a name that
    does not exist, a line that is no JSON object, an unknown split or subset, and for no rows at all.
    """
    if max_samples < 1 and max_samples != -1:
        raise DataError(f"{name}: max_samples={max_samples}, needs >= 1, or -1 for all rows")
    is_file = name.endswith(".jsonl")
    if is_file:
        if subset is not None:
            raise DataError(f"{name}: subset={subset!r}, but a .jsonl file has no subsets; needs None")
        dataset, line_numbers = _read_jsonl(Path(name), max_samples)
    else:
        dataset, line_numbers = _read_with_loader(name, split, subset), []
    count = len(dataset) if max_samples == -1 else min(max_samples, len(dataset))
    if count == 0:
        raise DataError(f"{name}: no rows" + ("" if is_file else f" in split {split!r}"))
    rows = []
    for index, values in enumerate(dataset.select(range(count))):
        where = f"{name}:{line_numbers[index]}" if is_file else f"{name}[{split}] row {index}"
        rows.append(Row(where, {key: value for key, value in values.items() if value is not None}))
    return rows


def _read_jsonl(path: Path, max_samples: int) -> tuple[Any, list[int]]:
    """A Dataset, and the 1-based line of each row. Blank lines are skipped.

    Lines are parsed here, not by the loader of `datasets`: that one names no line, turns strings that look like dates
    into timestamps, and caches.
    """
    objects: list[dict[str, Any]] = []
    line_numbers: list[int] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(objects) == max_samples:
                    break
                if line.strip():
                    objects.append(_parse_line(line, f"{path}:{number}"))
                    line_numbers.append(number)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return _to_dataset(objects, path, line_numbers), line_numbers


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}: {_shorten(line)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: needs one JSON object per line, found {type(value).__name__}: {_shorten(line)}")
    return value


def _to_dataset(objects: list[dict[str, Any]], path: Path, line_numbers: list[int]) -> Any:
    import datasets
    import pyarrow

    names = list(dict.fromkeys(key for item in objects for key in item))  # the loader looks at the first row alone
    columns = {}
    for name in names:
        column = [item.get(name) for item in objects]
        try:
            columns[name] = pyarrow.array(column)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
            raise DataError(f"{path}{_odd_one_out(column, line_numbers)}: column {name!r}: {error}") from None
    return datasets.Dataset(pyarrow.table(columns)) if columns else datasets.Dataset.from_dict({})


def _odd_one_out(column: list[Any], line_numbers: list[int]) -> str:
    """ ":<line>" of the first value whose type differs from the ones before it, as far as the top level shows it."""
    kinds = [(number, type(value)) for number, value in zip(line_numbers, column, strict=True) if value is not None]
    return next((f":{number}" for number, kind in kinds if kind is not kinds[0][1]), "")


def _read_with_loader(name: str, split: str, subset: str | None) -> Any:
    """A directory (local first) or a hub id, by `datasets.load_dataset`."""
    import datasets

    is_local = Path(name).is_dir()
    if not is_local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise DataError(f"{name}: no such directory (looked in {Path.cwd()}), and no hub id either")
    source = name if is_local else HUB_ALIASES.get(name, name)
    had_progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, name=subset, split=split)
    except Exception as error:  # the loader raises a dozen unrelated kinds (HTTP, Arrow, pickling, its own)
        kind = "directory" if is_local else "hub data set (there is no such directory here)"
        fix = "check split and subset" if is_local else "check the name, split, subset, network and HF_TOKEN"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}: cannot read split {split!r}, subset {subset!r} of this {kind}: {reason[:600]}. Fix: {fix}."
        ) from error
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()


def _shorten(text: str, limit: int = 120) -> str:
    text = text.strip()
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
