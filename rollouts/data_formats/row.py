"""A row of data, and the error of one that cannot be used."""

from dataclasses import dataclass
from typing import Any


class DataError(ValueError):
    """Data that cannot be used. The message names the file and line (or data set and row), the value and the need."""


@dataclass(frozen=True)
class Row:
    where: str  # "train.jsonl:17", "train.parquet row 16", "openai/gsm8k[train] row 16" (rows from 0, lines from 1)
    values: dict[str, Any]  # by column, plain data; a column that is null in this row is left out
