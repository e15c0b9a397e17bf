"""What one declaration says of a data format, for every part that asks. Pure; standard library only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError, Row

ColumnKind = Literal["text", "text or empty", "messages", "choices"]


@dataclass(frozen=True, kw_only=True)
class DataFormat:
    """One format of rows."""

    name: str  # as a config's `format` has it
    # those that become the conversation; a prompt keeps all others
    columns: Mapping[str, ColumnKind]
    # of the row, its other columns and the format's name; the columns that hold a text do
    example: Callable[[Row, dict[str, Any], str], Example]
    # a row with all these columns is of this format, where none is named; (): it must be named
    known_by: tuple[str, ...] = ()
    known_if: Callable[[Mapping[str, Any]], bool] | None = None  # and if its values are so
    is_array: bool = False  # a line of a .jsonl file is the array of messages, not an object
    made_here: bool = (
        False  # training/datasets/spelling.py makes the rows; a data set's name is a label
    )
    has_prompts: bool = True  # False: a text, for SFT and validation loss alone
    adds: tuple[str, ...] = ()  # columns that a prompt gets, beside messages, answer and format
    judge: str = "exact_match"  # how evaluation compares: a function of rewards/answer_rewards.py
    usual_reward: str | None = None  # rl.reward.fn that `deploy new` writes; None: it must be named

    def is_of(self, row: Any) -> bool:
        """Return whether a row, as JSON, shows that it is of this format."""
        if self.is_array:
            return isinstance(row, list)
        return (
            bool(self.known_by)
            and isinstance(row, dict)
            and all(column in row for column in self.known_by)
            and (self.known_if is None or self.known_if(row))
        )

    def read(self, row: Row) -> Example:
        """Return the row as an example. Raises DataError naming row, value and need."""
        for column, kind in self.columns.items():
            value = row.values.get(column)
            if need := text_needed(kind, value, "string"):
                raise DataError(
                    f"{row.where}: {column}={value!r}; format {self.name!r} needs {need} "
                    f"(columns: {sorted(row.values)})"
                )
        others = {key: value for key, value in row.values.items() if key not in self.columns}
        return self.example(row, others, self.name)


def text_needed(kind: ColumnKind, value: Any, text: str) -> str:
    """Return what a column that holds a text needs, where this value is not one; "" for all others."""
    if kind not in ("text", "text or empty"):
        return ""
    may_be_empty = kind == "text or empty"
    if isinstance(value, str) and (value.strip() or may_be_empty):
        return ""
    return f"a {text}" if may_be_empty else f"a {text} that is not empty"
