"""Choose samples by the columns of their index, and read the lines of those that are shown. Needs numpy."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rollouts.plain_files import reading
from rollouts.run_dir import parse_row
from rollouts.view.rollout_samples import sample_of
from rollouts.view.run_data import prompt_text
from rollouts.view.ui.run_source import PageError
from rollouts.view.ui.sample_index import LINE_BYTES_MAX, prompt_key

ORDERS = ("step", "-step", "reward", "-reward", "length", "-length", "advantage", "-advantage")
RANGED = ("step", "reward", "length", "advantage")
SEARCH_S = 0.4  # of one answer: a search goes on with the next
SEARCH_CHARS_MAX = 500
SPREAD_MIN = 1e-12  # of the rewards of a group that has contrast


@dataclass(frozen=True)
class SampleFilter:
    """Which samples are wanted, and in which order. Made by `read_filter`, which checks the words."""

    ranges: Mapping[str, tuple[float | None, float | None]]  # column → least, most; both included
    finish: str | None = None
    prompt_id: str | None = None
    contrast: bool | None = None  # of the sample's group
    order: str = "-step"
    text: str = ""  # in the prompt or the response, whatever its case


def read_filter(asked: Mapping[str, str]) -> SampleFilter:
    """Return the filter that a query string asks for. Raises PageError naming the word that is wrong."""
    ranges = {}
    for name in RANGED:
        low, high = (_bound(asked, f"{name}_{end}") for end in ("min", "max"))
        if low is not None or high is not None:
            ranges[name] = (low, high)
    contrast = {"": None, "yes": True, "no": False}.get(asked.get("contrast", ""), "unknown")
    order = asked.get("order") or "-step"
    if contrast == "unknown":
        raise PageError(f"contrast={asked['contrast']!r}: needs yes or no", status=400)
    if order not in ORDERS:
        raise PageError(f"order={order!r}: needs one of {', '.join(ORDERS)}", status=400)
    return SampleFilter(
        ranges=ranges,
        finish=asked.get("finish") or None,
        prompt_id=asked.get("prompt") or None,
        contrast=contrast if isinstance(contrast, bool) else None,
        order=order,
        text=asked.get("text", "")[:SEARCH_CHARS_MAX],
    )


def _bound(asked: Mapping[str, str], name: str) -> float | None:
    text = asked.get(name, "")
    try:
        return float(text) if text else None
    except ValueError:
        raise PageError(f"{name}={text!r} is not a number", status=400) from None


class Samples:
    """The samples of an index, without those that a resumed run wrote again. Positions are places in the columns."""

    def __init__(self, columns: Mapping[str, Any], finish: Sequence[str]) -> None:
        self.columns = columns
        self.finish = tuple(finish)
        self._kept = _not_replaced(columns["step"], columns["group"])

    @property
    def count(self) -> int:
        return int(self._kept.sum())

    @cached_property
    def _begins(self) -> Any:
        """Return the positions at which a group's samples begin: they follow one another in the file."""
        import numpy

        step, group = self.columns["step"], self.columns["group"]
        changes = (numpy.diff(step) != 0) | (numpy.diff(group) != 0)
        return (
            numpy.flatnonzero(numpy.concatenate(([True], changes)))
            if len(step)
            else numpy.empty(0, int)
        )

    @cached_property
    def has_contrast(self) -> Any:
        """Return for each sample whether the rewards of its group differ."""
        import numpy

        begins, rewards = self._begins, self.columns["reward"]
        if not len(begins):
            return numpy.empty(0, bool)
        spread = numpy.maximum.reduceat(rewards, begins) - numpy.minimum.reduceat(rewards, begins)
        return numpy.repeat(spread > SPREAD_MIN, numpy.diff(numpy.append(begins, len(rewards))))

    def chosen(self, wanted: SampleFilter) -> Any:
        """Return the positions that fit, in order; the text is not looked at."""
        import numpy

        mask = self._kept.copy()
        for name, (low, high) in wanted.ranges.items():
            column = self.columns[name]
            if low is not None:
                mask &= column >= low
            if high is not None:
                mask &= column <= high
        if wanted.finish is not None:
            mask &= self.columns["finish"] == (
                self.finish.index(wanted.finish) if wanted.finish in self.finish else -1
            )
        if wanted.prompt_id is not None:
            mask &= self.columns["prompt"] == numpy.uint64(prompt_key(wanted.prompt_id))
        if wanted.contrast is not None:
            mask &= self.has_contrast == wanted.contrast
        found = numpy.flatnonzero(mask)
        name, downwards = wanted.order.lstrip("-"), wanted.order.startswith("-")
        if wanted.order == "step":
            return found
        if wanted.order == "-step":
            return self._newest_first(found)
        keys = self.columns[name][found]
        return found[numpy.argsort(-keys if downwards else keys, kind="stable")]

    def _newest_first(self, found: Any) -> Any:
        """Return positions by step, the last first; within one in the order of the file."""
        import numpy

        return found[numpy.argsort(-self.columns["step"][found].astype("i8"), kind="stable")]

    def at(self, offset: int) -> int:
        """Return the position of the sample whose line begins at `offset`. Raises PageError."""
        import numpy

        offsets = self.columns["offset"]
        place = int(numpy.searchsorted(offsets, offset))
        if place >= len(offsets) or offsets[place] != offset:
            raise PageError(
                f"there is no sample at byte {offset}: the link is of another run, or not indexed yet"
            )
        return place

    def group_of(self, position: int) -> list[int]:
        """Return the positions of all samples of a sample's group."""
        import numpy

        place = int(numpy.searchsorted(self._begins, position, side="right")) - 1
        begin = int(self._begins[place])
        end = (
            int(self._begins[place + 1])
            if place + 1 < len(self._begins)
            else len(self.columns["step"])
        )
        inside = range(begin, end)
        return [at for at in inside if self._kept[at] == self._kept[position]]

    def through_training(self, position: int) -> list[dict[str, Any]]:
        """Return what a sample's prompt earned at each step that had it: mean reward, samples, the first's line."""
        import numpy

        same = numpy.flatnonzero(
            self._kept & (self.columns["prompt"] == self.columns["prompt"][position])
        )
        steps, begins, counts = numpy.unique(
            self.columns["step"][same], return_index=True, return_counts=True
        )
        if not len(steps):
            return []
        sums = numpy.add.reduceat(self.columns["reward"][same], begins)
        offsets = self.columns["offset"][same[begins]]
        rows = zip(
            steps.tolist(), (sums / counts).tolist(), counts.tolist(), offsets.tolist(), strict=True
        )
        return [
            {"step": step, "reward": mean, "samples": count, "offset": at}
            for step, mean, count, at in rows
        ]

    def bounds(self) -> dict[str, Any]:
        """Return what one may filter by: least and most of each column, and the finish reasons."""
        if not self.count:
            return {"finish": []}
        found: dict[str, Any] = {"finish": list(self.finish)}
        for name in ("step", "reward", "length"):
            column = self.columns[name]
            found[name] = [column.min().item(), column.max().item()]
        return found


def _not_replaced(step: Any, group: Any) -> Any:
    """Return which records stand: a resumed run writes steps again, and the earlier lines of those no longer count.

    It begins anew where (step, group) falls: what stands before with that step or a later one is replaced.
    """
    import numpy

    if not len(step):
        return numpy.empty(0, bool)
    steps = step.astype("i8")
    key = (steps << 31) | group
    falls = numpy.flatnonzero(key[1:] < key[:-1]) + 1
    if not len(falls):
        return numpy.ones(len(step), bool)
    bound = numpy.full(len(step) + 1, 2**62)
    bound[falls] = steps[falls]
    later = numpy.minimum.accumulate(bound[::-1])[::-1][
        1:
    ]  # the lowest step that is begun anew after each record
    return steps < later


# --- lines ------------------------------------------------------------------------------------------------------------


def read_lines(
    file: Path, samples: Samples, positions: Sequence[int]
) -> list[dict[str, Any] | None]:
    """Return the rows at these positions; None for one that is no longer there."""
    rows = []
    with reading(file) as stream:
        for at in positions:
            stream.seek(int(samples.columns["offset"][at]))
            rows.append(
                parse_row(stream.read(min(int(samples.columns["bytes"][at]), LINE_BYTES_MAX)))
            )
    return rows


@dataclass(frozen=True)
class Found:
    """A part of a search: positions that have the text, and where in the chosen ones to go on (None: all are read)."""

    positions: list[int]
    next: int | None


def search(file: Path, samples: Samples, chosen: Any, text: str, *, begin: int, most: int) -> Found:
    """Read the chosen samples from the `begin`-th on until `most` have the text in prompt or response, or time is up.

    A line without the text's letters anywhere is not parsed.
    """
    wanted, until = text.lower(), time.monotonic() + SEARCH_S
    ascii_part = max(
        "".join(
            c if c.isascii() and c not in '"\\/' and c.isprintable() else "\0" for c in text
        ).split("\0"),
        key=len,
    )
    sieve = ascii_part.lower().encode()
    found: list[int] = []
    with reading(file) as stream:
        for place in range(begin, len(chosen)):
            at = int(chosen[place])
            stream.seek(int(samples.columns["offset"][at]))
            line = stream.read(min(int(samples.columns["bytes"][at]), LINE_BYTES_MAX))
            if sieve in line.lower() and _has_text(parse_row(line), wanted):
                found.append(at)
            if len(found) >= most or time.monotonic() > until:
                return Found(found, place + 1 if place + 1 < len(chosen) else None)
    return Found(found, None)


def _has_text(row: dict[str, Any] | None, wanted: str) -> bool:
    sample = sample_of(row)
    if sample is None:
        return False
    return wanted in sample.response.lower() or wanted in prompt_text(sample.prompt).lower()


def brief(row: dict[str, Any] | None, samples: Samples, position: int) -> dict[str, Any]:
    """Return a sample as a list shows it."""
    sample = sample_of(row)
    columns = samples.columns
    shown = {
        "offset": int(columns["offset"][position]),
        "step": int(columns["step"][position]),
        "group": int(columns["group"][position]),
        "length": int(columns["length"][position]),
        "reward": float(columns["reward"][position]),
        "contrast": bool(samples.has_contrast[position]),
    }
    if sample is None:
        return {
            **shown,
            "gone": True,
            "prompt": "",
            "response": "",
            "finish": "",
            "advantage": None,
        }
    return {
        **shown,
        "advantage": sample.advantage,
        "finish": sample.finish_reason,
        "prompt": _short(prompt_text(sample.prompt)),
        "response": _short(sample.response),
    }


def _short(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
