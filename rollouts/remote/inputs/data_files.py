"""Data and models that a config names, as far as their files here show them: rows, columns, parameters."""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from rollouts.config import DatasetSpec
from rollouts.data_formats import FORMATS, format_named
from rollouts.plain_files import read_plain, reading
from rollouts.remote.errors import Problem
from rollouts.remote.inputs.hub_card import files_by_card, has_configs
from rollouts.remote.inputs.paths import SentFiles, path_problem, pointer_problem
from rollouts.remote.inputs.row_counts import READ_BYTES_MAX, files_of_split, rows_of_file
from rollouts.remote.inputs.shapes import ShapeError, shape_of

# a prompt's, beside the file's own
COLUMNS_MADE = {"messages", "answer", "format", "task", "tools"}.union(
    *(declared.adds for declared in FORMATS)
)
HEADER_BYTES_MAX = 64 * 2**20
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
MODEL_FILES_MORE = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
DATA_FILES = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".zst",
    ".gz",
    ".xz",
    ".bz2",
    ".tar",
)


@dataclass(frozen=True)
class RowCount:
    """How many rows of a data set the mixture holds."""

    name: str
    rows: int | None  # None: unknown
    how: Literal["counted", "at most", "unknown"]


def count_rows(spec: DatasetSpec, sent: SentFiles) -> RowCount:
    """Count the rows of local .jsonl files and of parquet; of other data only what the config bounds is known."""
    if format_named(spec.format).made_here:
        return RowCount(spec.name, _selected(spec, None), "counted")
    rows = _rows_here(spec, sent)
    if rows is not None:
        return RowCount(spec.name, _selected(spec, rows), "counted")
    most = _selected(spec, None)
    return RowCount(spec.name, most, "unknown" if most is None else "at most")


def _selected(spec: DatasetSpec, rows: int | None) -> int | None:
    """Return how many of `rows` (None: without end) the slice, the maximum and the repetitions leave."""
    ends = [end for end in (rows, None if spec.stop == -1 else spec.stop) if end is not None]
    counts = [len(range(spec.start, max(spec.start, min(ends)), spec.step))] if ends else []
    counts += [spec.max_samples] if spec.max_samples != -1 else []
    return min(counts) * spec.repeat if counts else None


def _rows_here(spec: DatasetSpec, sent: SentFiles) -> int | None:
    """Return rows of a .jsonl file or a data folder that is sent; None where its files leave a doubt."""
    where = sent.locate(spec.name)
    if spec.name.startswith("/") or where.state != "sent":
        return None
    if where.file in sent.files:
        return rows_of_file(sent.root / where.file) if spec.name.endswith(".jsonl") else None
    below = list(sent.below(where.file))
    prefix = f"{where.file}/" if where.file else ""
    card = _card(sent.root / where.file) if f"{prefix}README.md" in below else ""
    data = [file for file in below if file.endswith(DATA_FILES)]
    if card is None or (spec.subset is not None and not has_configs(card)):
        return None
    if has_configs(card):
        inner = {file.removeprefix(prefix): file for file in data}
        files = [inner[file] for file in files_by_card(card, list(inner), spec.subset, spec.split)]
    else:
        files = files_of_split(data, spec.split)
    counts = [rows_of_file(sent.root / file) for file in files]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _card(folder: Path) -> str | None:
    """Return the text of a folder's README.md; None for one that cannot be read."""
    try:
        return read_plain(folder / "README.md").decode("utf-8")
    except (OSError, ValueError):
        return None


def absent_columns(specs: Sequence[DatasetSpec], keys: Iterable[str], sent: SentFiles) -> list[str]:
    """Return those of `keys` that no prompt of these data sets has; [] if any of the data is not a file here."""
    wanted = [key for key in keys if key not in COLUMNS_MADE]
    for spec in specs:
        where = sent.locate(spec.name)
        declared = format_named(spec.format)
        local = not declared.made_here and spec.name.endswith(".jsonl") and where.state == "sent"
        if not local or not wanted:
            return []
        present = _columns(sent.root / where.file, set(wanted))
        if present is None:
            return []
        wanted = [key for key in wanted if key not in present - declared.columns.keys()]
    return wanted


def _columns(file: Path, wanted: set[str]) -> set[str] | None:
    """Return which of `wanted` some row of a .jsonl file has. None if that cannot be told: too large, damaged."""
    present = set[str]()
    try:
        if file.stat().st_size > READ_BYTES_MAX:
            return None
        with reading(file) as lines:
            for line in lines:
                row = json.loads(line) if line.strip() else None
                if isinstance(row, dict):
                    present |= wanted & row.keys()
                if present == wanted:
                    break
    except (OSError, ValueError, RecursionError):
        return None
    return present


# --- folders --------------------------------------------------------------------------------------------------------


def contents_problems(
    sent: SentFiles, name: str, *, kind: Literal["model", "data"], weights: bool
) -> Iterator[Problem]:
    """Return why a file or folder that is sent would be another on the host: links out, pointers, ignored parts."""
    where = sent.locate(name)
    if where.state != "sent":
        return
    if where.file in sent.files:
        if pointer := pointer_problem(sent.root, where.file):
            yield pointer
        return
    for file in sent.below(where.file):
        inner = sent.locate(file)
        problem = path_problem(inner) or (
            pointer_problem(sent.root, inner.file) if inner.file else None
        )
        if problem is not None:
            yield problem
    yield from _left_behind(sent, where.file, kind=kind, weights=weights)
    everything = [*sent.below(where.file), *sent.left_behind(where.file)]
    if kind == "model" and weights and not any(file.endswith(WEIGHTS) for file in everything):
        yield Problem(
            f"model.name={name!r} has no weights.",
            found=", ".join(sorted(file.rpartition("/")[2] for file in sent.below(where.file))[:8]),
            needed="*.safetensors beside its config.json",
            fix="model.init='random' draws them; or put them there",
        )


def _left_behind(sent: SentFiles, folder: str, *, kind: str, weights: bool) -> Iterator[Problem]:
    missing = [
        file
        for file in sent.left_behind(folder)
        if not any(part.startswith(".") for part in file.split("/"))
    ]
    if kind == "data":
        missing = [file for file in missing if file.endswith(DATA_FILES)]
    else:
        here = {file.rpartition("/")[2] for file in sent.below(folder)}
        shards = _shards(sent.root / folder)
        has_weights = any(file.endswith(WEIGHTS) for file in here)
        missing = [
            file
            for file in missing
            if file.rpartition("/")[2] in (*MODEL_FILES, *MODEL_FILES_MORE)
            or (
                weights
                and file.endswith(WEIGHTS)
                and (not has_weights or file.rpartition("/")[2] in shards)
            )
        ]
    if missing:
        more = [f"and {len(missing) - 8} more"] if len(missing) > 8 else []
        yield Problem(
            f"{folder!r} would reach the host without files that git ignores.",
            found="\n".join([*missing[:8], *more]),
            needed=f"the whole {kind}: what git lists is what is sent",
            fix=f"remove them from .gitignore (git check-ignore -v {missing[0]}), or copy the folder to the host and "
            f"name it there: /…/{folder.rpartition('/')[2]}",
        )


def _shards(folder: Path) -> set[str]:
    try:
        return set(
            json.loads(read_plain(folder / "model.safetensors.index.json"))["weight_map"].values()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()


# --- parameters -----------------------------------------------------------------------------------------------------


def count_parameters(folder: Path, *, from_weights: bool) -> int | None:
    """Count a local model's parameters, by its safetensors' headers or its config.json; None if neither tells."""
    counts = (
        [_tensor_elements(file) for file in sorted(folder.glob("*.safetensors"))]
        if from_weights
        else []
    )
    if counts and None not in counts:
        return sum(filter(None, counts))
    config = read_model_config(folder)
    try:
        return None if config is None else shape_of(config).parameters
    except ShapeError:
        return None


def read_model_config(folder: Path) -> dict[str, Any] | None:
    """Return a local model's config.json; None for one that cannot be read."""
    try:
        config = json.loads(read_plain(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _tensor_elements(file: Path) -> int | None:
    try:
        with reading(file) as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size)) if size < HEADER_BYTES_MAX else {}
        return sum(prod(value["shape"]) for key, value in header.items() if key != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError):
        return None
