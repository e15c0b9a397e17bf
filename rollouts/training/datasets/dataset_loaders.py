"""Load data sets and mixtures for SFT, RL and evaluation.

A mixture is a flat list of (spec, row index) shuffled once with `random.Random(seed)`, as in nanochat: `repeat` lists a
spec's rows several times, and there is no reshuffle here between epochs.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rollouts.data_formats import FormatName, format_named, parse_row
from rollouts.data_formats.examples import Example, check_answer
from rollouts.data_formats.row import DataError, Row
from rollouts.training.datasets.prompts import OWN_TOOLS, fitting_prompts
from rollouts.training.datasets.report import MixtureReport, PromptReport, SFTReport
from rollouts.training.datasets.rows import read_rows
from rollouts.training.datasets.selection import Selection
from rollouts.training.datasets.sft import build_sft_samples
from rollouts.training.datasets.spelling import spelling_rows
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt, Sample

logger = logging.getLogger(__name__)
WORKERS_PAY_FROM = (
    20_000  # examples: about half a minute in one process; starting workers takes some ten seconds
)


class MixtureSpec(Protocol):
    """One data set of a mixture; `rollouts.config.DatasetSpec` is one."""

    @property
    # hub id, directory or .jsonl file; of synthetic formats just a label
    def name(self) -> str: ...
    @property
    def format(self) -> Any: ...  # one of rollouts.data_formats.FORMATS
    @property
    def split(self) -> str: ...
    @property
    def subset(self) -> str | None: ...
    @property
    # of a shuffle before all else; None: rows in file order
    def shuffle_seed(self) -> int | None: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...  # -1: to the end
    @property
    def step(self) -> int: ...
    @property
    def max_samples(self) -> int: ...  # the first N of [start:stop:step]; -1: all
    @property
    def streaming(self) -> bool: ...  # pull rows one by one, only as many as are needed
    @property
    def repeat(self) -> int: ...  # how often the rows occur in the mixture


@dataclass(frozen=True)
class DatasetEntry:
    """A MixtureSpec for those who use the library without a job config."""

    name: str
    format: FormatName | None  # None: by the columns
    split: str = "train"
    subset: str | None = None
    shuffle_seed: int | None = None
    start: int = 0
    stop: int = -1
    step: int = 1
    max_samples: int = -1
    streaming: bool = False
    repeat: int = 1


def load_sft_dataset(
    name: str,
    *,
    tokenizer: Tokenizer,
    split: str = "train",
    subset: str | None = None,
    max_samples: int = -1,
    max_length: int = -1,
    format: FormatName | None = None,
    streaming: bool = False,
) -> list[Sample]:
    """Return SFT samples of one data set, in its order; rows left out are logged as a warning.

    name: "gsm8k" or another hub id, a local directory laid out as on the hub, or a .jsonl file. format None: by the
    columns. max_samples rows are read (-1: all), with `streaming` no more than those are fetched. Conversations
    over max_length tokens (-1: no limit) are left out. Raises DataError naming the file and line (or the row).
    """
    entry = DatasetEntry(name, format, split, subset, max_samples=max_samples, streaming=streaming)
    samples, report = build_sft_samples(load_examples(entry), tokenizer, max_length=max_length)
    _log(name, report)
    return samples


def load_sft_mixture(
    specs: Sequence[MixtureSpec],
    *,
    tokenizer: Tokenizer,
    max_length: int,
    seed: int | None,
    num_workers: int = 0,
) -> tuple[list[Sample], SFTReport]:
    """Return all SFT samples of a mixture and the report over all of it (a repeated row counts each time).

    seed: of the one shuffle; None: one data set after the other, a curriculum. num_workers: processes that may render
    chat templates, where there are examples enough that starting them pays; the samples are the same.
    """
    examples = _mix(specs, seed)
    workers = num_workers if len(examples) >= WORKERS_PAY_FROM else 0
    samples, report = build_sft_samples(
        examples, tokenizer, max_length=max_length, num_workers=workers
    )
    _log(", ".join(spec.name for spec in specs), report)
    return samples, report


def load_prompt_mixture(specs: Sequence[MixtureSpec], *, seed: int) -> list[dict[str, Any]]:
    """Return all prompt rows of a mixture, shuffled: {"messages", "answer", "format", other columns}.

    Raises DataError for plain text, which has no question.
    """
    return [_prompt_of(example) for example in _mix(specs, seed)]


def load_fitting_prompts(
    specs: Sequence[MixtureSpec],
    *,
    seed: int,
    tokenizer: Tokenizer,
    tokens_max: int = -1,
    tools: Any = OWN_TOOLS,
    row_problem: Callable[[Prompt], str | None] | None = None,
) -> tuple[list[dict[str, Any]], PromptReport]:
    """Return `load_prompt_mixture` without prompts that are too long or that the reward cannot use, and the report.

    See `fitting_prompts`.
    """
    examples = _mix(specs, seed)
    for example in examples:
        _prompt_of(example)
    rows, report = fitting_prompts(
        examples, tokenizer, tokens_max=tokens_max, tools=tools, row_problem=row_problem
    )
    _log(", ".join(spec.name for spec in specs), report)
    return rows, report


def load_examples(spec: MixtureSpec) -> list[Example]:
    """Return the selected rows of one data set, once. Raises DataError naming the file and line (or the row)."""
    selection = Selection(spec.shuffle_seed, spec.start, spec.stop, spec.step, spec.max_samples)
    if spec.format is not None and format_named(spec.format).made_here:
        rows = spelling_rows(spec.format, split=spec.split, selection=selection)
    else:
        rows = read_rows(
            spec.name,
            split=spec.split,
            subset=spec.subset,
            selection=selection,
            streaming=spec.streaming,
            array_column=_array_column(spec.format),
        )
    return [parse_row(row, spec.format) for row in rows]


def load_prompts_from_jsonl(
    path: str | Path, format: FormatName | None = None
) -> list[dict[str, Any]]:
    """Return prompt rows of a .jsonl file, in file order: {"messages", "answer" if the row has one, other columns}.

    A line is in `format`, or has a "prompt" string, or is read by its columns. Raises DataError with file and
    line.
    """
    if Path(path).suffix.lower() != ".jsonl":
        raise DataError(f"{path}: needs a .jsonl file")
    rows = read_rows(str(path), array_column=_array_column(format))
    return [_prompt(row, format) for row in rows]


def _array_column(format: FormatName | None) -> str | None:
    return "messages" if format is not None and format_named(format).is_array else None


def _prompt(row: Row, format: FormatName | None) -> dict[str, Any]:
    return (
        _plain_prompt(row)
        if format is None and "prompt" in row.values
        else _prompt_of(parse_row(row, format))
    )


def _prompt_of(example: Example) -> dict[str, Any]:
    if example.text is not None:
        raise DataError(
            f"{example.where}: plain text has no prompt to answer; it is for SFT and validation loss"
        )
    return example.prompt


def _plain_prompt(row: Row) -> dict[str, Any]:
    text = row.values["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{row.where}: prompt={text!r}; needs a string that is not empty")
    taken = ("prompt", "format", "messages")  # a row has a format once it is read in one
    others = {key: value for key, value in row.values.items() if key not in taken}
    if dropped := sorted(key for key in row.values if key in taken[1:]):
        logger.warning(
            "%s: columns %s are not used: the prompt has keys of these names", row.where, dropped
        )
    if "answer" in others:
        check_answer(others["answer"], row.where)
    return {**others, "messages": [{"role": "user", "content": text}]}


def _mix(specs: Sequence[MixtureSpec], seed: int | None) -> list[Example]:
    """Return examples of all specs, each `repeat` times: in one seeded order, or with seed None as they are listed."""
    if not specs:
        raise DataError("the mixture is empty: needs at least one data set")
    for spec in specs:
        if spec.repeat < 1:
            raise DataError(f"{spec.name}: repeat={spec.repeat}, needs >= 1")
    loaded = [load_examples(spec) for spec in specs]
    order = [
        (task, index)
        for task, (spec, examples) in enumerate(zip(specs, loaded, strict=True))
        for _ in range(spec.repeat)
        for index in range(len(examples))
    ]
    if seed is not None:
        random.Random(seed).shuffle(order)
    return [loaded[task][index] for task, index in order]


def _log(name: str, report: MixtureReport) -> None:
    logger.log(logging.WARNING if report.noteworthy else logging.INFO, "%s: %s", name, report)
