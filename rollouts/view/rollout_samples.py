"""Read rollouts.jsonl within bounds of time and memory: the best and the worst samples, and some of all."""

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.plain_files import reading
from rollouts.run_dir import parse_row
from rollouts.view.json_numbers import is_number

# of a file that is read: of a larger one, as many parts as hold that, evenly spread
BYTES_MAX = 1 << 28
PARTS = 64


@dataclass(frozen=True)
class RolloutSample:
    """One sample of the RL stage."""

    step: int
    group: int
    prompt: Any
    prompt_id: str
    response: str
    reward: float
    advantage: float | None
    length: int  # tokens of the response
    finish_reason: str


@dataclass(frozen=True)
class SampleDigest:
    """What a report shows of a run's samples."""

    best: tuple[RolloutSample, ...]  # the highest rewards, highest first; of equal ones the latest
    worst: tuple[RolloutSample, ...]  # the lowest rewards, lowest first; of equal ones the latest
    points: tuple[tuple[int, int, float], ...]  # (step, length, reward) of samples evenly taken
    count: int  # samples read
    damaged: int  # lines that are not samples
    bytes_read: int
    bytes_total: int


def digest_samples(
    path: Path, *, shown: int, points: int, bytes_max: int = BYTES_MAX
) -> SampleDigest:
    """Read a file's samples once. A missing file has none."""
    kept = _Kept(shown, points)
    try:
        total = path.stat().st_size
    except OSError:
        total = 0
    ranges = [(0, total)] if total <= bytes_max else _spread(total, bytes_max)
    count = damaged = 0
    for begin, end in ranges:
        for line in _lines(path, begin, end):
            sample = sample_of(parse_row(line))
            if sample is None:
                damaged += 1
            else:
                count += 1
                kept.add(sample)
    read = sum(end - begin for begin, end in ranges)
    return SampleDigest(kept.best(), kept.worst(), tuple(kept.points), count, damaged, read, total)


def sample_of(row: dict[str, Any] | None) -> RolloutSample | None:
    """Return a line's sample; None where it lacks a step, a reward or a response."""
    if row is None or not is_number(row.get("reward")) or not isinstance(row.get("response"), str):
        return None
    step, group, length = row.get("step"), row.get("group", 0), row.get("response_length", 0)
    if not all(isinstance(value, int) for value in (step, group, length)):
        return None
    return RolloutSample(
        step=int(row["step"]),
        group=int(group),
        prompt=row.get("prompt"),
        prompt_id=str(row.get("prompt_id", "")),
        response=row["response"],
        reward=float(row["reward"]),
        advantage=float(row["advantage"]) if is_number(row.get("advantage")) else None,
        length=int(length),
        finish_reason=str(row.get("finish_reason", "")),
    )


def _spread(total: int, bytes_max: int) -> list[tuple[int, int]]:
    size, apart = bytes_max // PARTS, total // PARTS
    return [(part * apart, part * apart + size) for part in range(PARTS)]


def _lines(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """Return the complete lines that begin in [begin, end). A line that `begin` cuts belongs to the part before."""
    try:
        stream = reading(path)
    except OSError:
        return
    with stream:
        if begin:
            stream.seek(begin - 1, os.SEEK_SET)
            stream.readline()
        while stream.tell() < end and (line := stream.readline()).endswith(b"\n"):
            yield line


class _Kept:
    """The samples that stay, as they come: at most twice as many points as asked for."""

    def __init__(self, shown: int, points: int) -> None:
        self._shown, self._points_max = shown, points
        self._seen = 0
        self._every = 1
        self._last_step = -1
        self._best: list[tuple[float, int, RolloutSample]] = []
        self._worst: list[tuple[float, int, RolloutSample]] = []
        self.points: list[tuple[int, int, float]] = []

    def add(self, sample: RolloutSample) -> None:
        if sample.step < self._last_step:
            self._replace_from(sample.step)
        self._last_step = sample.step
        for heap, sign in ((self._best, 1.0), (self._worst, -1.0)):
            item = (sign * sample.reward, self._seen, sample)
            if len(heap) < self._shown:
                heapq.heappush(heap, item)
            else:
                heapq.heappushpop(heap, item)
        if self._seen % self._every == 0:
            self.points.append((sample.step, sample.length, sample.reward))
            if len(self.points) > self._points_max:
                self.points, self._every = self.points[::2], self._every * 2
        self._seen += 1

    def _replace_from(self, step: int) -> None:
        """Drop what a resumed run writes again: steps from this one on."""
        for heap in (self._best, self._worst):
            heap[:] = [item for item in heap if item[2].step < step]
            heapq.heapify(heap)
        self.points = [point for point in self.points if point[0] < step]

    def best(self) -> tuple[RolloutSample, ...]:
        return tuple(sample for _, _, sample in sorted(self._best, reverse=True))

    def worst(self) -> tuple[RolloutSample, ...]:
        return tuple(sample for _, _, sample in sorted(self._worst, reverse=True))
