"""Read a run directory into values: series, evaluations, answers, events. It writes nothing there.

A run that goes on, one of an earlier version and one with damaged lines are read as far as they tell something; what
was left out is counted.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rollouts.health.series import Series
from rollouts.health.usage import is_usage_row
from rollouts.plain_files import read_plain
from rollouts.run_dir import RunDir, Status, read_status
from rollouts.view.fold import time_of
from rollouts.view.growing_rows import GrowingRows
from rollouts.view.json_numbers import is_number

Row = dict[str, Any]
STAGE_ORDER = ("sft", "rl")
# of a file that is read as a whole: a config, a commit, a list of packages
SMALL_FILE_BYTES_MAX = 1 << 22


class NotARunError(ValueError):
    """A path is not a run directory. The message says what is missing."""


@dataclass(frozen=True)
class HeldOutAnswer:
    """The answer to one held-out row in one evaluation."""

    stage: str
    step: int
    row: int
    prompt_id: str
    prompt: Any
    task: str
    expected: str | None
    answer: str
    correct: bool
    reward: float | None


@dataclass(frozen=True)
class RunData:
    """What a run directory tells, but for its rollouts, which may be large: `rollout_samples` reads them."""

    path: Path
    config: Row | None  # config.json; None: missing or damaged
    status: Status | None
    metrics: Mapping[str, tuple[Row, ...]]  # by stage, in the order of steps
    evaluations: tuple[Row, ...]
    answers: tuple[HeldOutAnswer, ...]
    events: tuple[Row, ...]
    # of gpu.jsonl: how busy GPUs and processes were, by host; "": of a run on one. The first one leads
    usage_by_host: Mapping[str, tuple[Row, ...]]
    packages: tuple[str, ...]  # name==version, of the trainer's environment
    commit: str
    code_digest: str  # of all files that ran; "": an older version recorded none
    uncommitted: bool  # the code had changes that no commit holds
    damage: Mapping[str, int]  # lines that could not be used, by file
    remarks: tuple[str, ...]  # what else could not be read, and why

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def usage(self) -> tuple[Row, ...]:
        """Return the samples of the host that leads."""
        return next(iter(self.usage_by_host.values()))

    @property
    def stages(self) -> tuple[str, ...]:
        """Return the stages that logged a step: those that are known first, in their order."""
        return (
            *(s for s in STAGE_ORDER if s in self.metrics),
            *sorted(set(self.metrics) - {*STAGE_ORDER}),
        )

    def series(self, stage: str, name: str) -> Series:
        """Return a metric of a stage; one without points where no step logged it as a finite number."""
        found = self._asked.get((stage, name))
        if found is None:
            found = self._asked[stage, name] = self._series(stage, name)
        return found

    @cached_property
    def _asked(self) -> dict[tuple[str, str], Series]:
        """Return the series that were asked for: charts, rules and tables ask for the same ones."""
        return {}

    def _series(self, stage: str, name: str) -> Series:
        points = [
            (row["step"], row["time"], float(row[name]))
            for row in self.metrics.get(stage, ())
            if is_number(row.get(name))
        ]
        steps, times, values = zip(*points, strict=True) if points else ((), (), ())
        return Series(stage, name, steps, times, values)

    def metric_names(self, stage: str) -> tuple[str, ...]:
        """Return the numbers that a stage logged, in the order in which they first came."""
        found: dict[str, None] = {}
        for row in self.metrics.get(stage, ()):
            for name in row:
                if name not in found and is_number(row[name]):
                    found[name] = None
        return tuple(name for name in found if name not in ("step", "time"))


def read_run(path: Path, growing: GrowingRows | None = None) -> RunData:
    """Read a run directory, here or a mirror. Raises NotARunError.

    `growing` is kept from one look to the next: of rows only those that came since are then read.
    """
    run, reader = RunDir(path), _Reader(growing or GrowingRows())
    if not path.is_dir():
        raise NotARunError(f"{path}: no such directory")
    if not any(file.exists() for file in (run.config, run.events, run.metrics, run.status)):
        raise NotARunError(
            f"{path}: not a run: it has no config.json, status.json, events.jsonl or metrics.jsonl"
        )
    config = reader.json(run.config)
    metrics = by_stage(reader.rows(run.metrics, is_metrics_row))
    evaluations = tuple(reader.rows(run.eval, _is_evaluation))
    answers = tuple(map(_answer, reader.rows(run.eval_samples, _is_answer)))
    events = tuple(
        reader.rows(
            run.events, lambda row: isinstance(row.get("kind"), str) and is_number(row.get("time"))
        )
    )
    packages = tuple(
        line for line in reader.text(run.environment("trainer")).splitlines() if "==" in line
    )
    status, manifest = reader.status(run), reader.json(run.code_manifest)
    commit, dirty = (
        reader.text(run.code / "commit.txt").strip(),
        reader.text(run.code / "dirty.diff").strip(),
    )
    return RunData(
        path=path,
        config=config if isinstance(config, dict) else None,
        status=status,
        metrics=metrics,
        evaluations=evaluations,
        answers=answers,
        events=events,
        usage_by_host=_usage_by_host(run, reader),
        packages=packages,
        commit=commit,
        code_digest=str(manifest.get("digest", "")) if isinstance(manifest, dict) else "",
        uncommitted=bool(dirty),
        damage=dict(reader.damage),
        remarks=tuple(reader.remarks),
    )


def _usage_by_host(run: RunDir, reader: "_Reader") -> dict[str, tuple[Row, ...]]:
    first = tuple(reader.rows(run.gpu, is_usage_row))
    others = sorted(run.path.glob("hosts/[0-9]*"), key=lambda path: (len(path.name), path.name))
    if not others:
        return {"": first}
    plan = reader.json(run.plan)
    try:
        names = [str(host["name"]) for host in plan["group"]["hosts"]]
    except (TypeError, KeyError):
        names = []
    names += [f"host {rank}" for rank in range(len(names), 1 + len(others))]
    found = {names[0]: first}
    for rank, path in enumerate(others, 1):
        found[names[rank]] = tuple(reader.rows(RunDir(path).gpu, is_usage_row))
    return found


class _Reader:
    """Reads files, and notes what could not be used."""

    def __init__(self, growing: GrowingRows) -> None:
        self._growing = growing
        self.damage: Counter[str] = Counter()
        self.remarks: list[str] = []

    def rows(self, path: Path, usable: Any) -> list[Row]:
        """Return the rows that are `usable`. A last line that is still being written is not counted as damaged."""
        try:
            rows, lost = self._growing.read(path, usable)
        except OSError as error:
            self.remarks.append(f"{path.name} cannot be read: {error.strerror or error}")
            return []
        if lost:
            self.damage[path.name] += lost
        return rows

    def text(self, path: Path) -> str:
        """Return a small file's text; "" where it is missing, or is not a plain file."""
        try:
            if path.stat().st_size > SMALL_FILE_BYTES_MAX:
                self.remarks.append(
                    f"{path.name} is left out: more than {SMALL_FILE_BYTES_MAX} bytes"
                )
                return ""
            return read_plain(path).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.remarks.append(f"{path.name} cannot be read: {error.strerror or error}")
            return ""

    def json(self, path: Path) -> Any:
        text = self.text(path)
        try:
            return json.loads(text) if text else None
        except (ValueError, RecursionError):
            self.remarks.append(f"{path.name} is damaged: not JSON")
            return None

    def status(self, run: RunDir) -> Status | None:
        try:
            return read_status(run)
        except (ValueError, TypeError, OSError):
            self.remarks.append(f"{run.status.name} is damaged, or of another version")
            return None


def by_stage(rows: Iterable[Row]) -> dict[str, tuple[Row, ...]]:
    """Return rows of metrics.jsonl by stage and in the order of steps; of a step that was logged twice, the later."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["stage"], {})[row["step"]] = row
    return {stage: tuple(steps[step] for step in sorted(steps)) for stage, steps in found.items()}


def is_metrics_row(row: Row) -> bool:
    return (
        isinstance(row.get("stage"), str)
        and _is_count(row.get("step"))
        and time_of(row) is not None
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_evaluation(row: Row) -> bool:
    texts = all(isinstance(row.get(name), str) for name in ("stage", "metric"))
    return (
        texts
        and _is_count(row.get("step"))
        and (row.get("value") is None or is_number(row["value"]))
    )


def _is_answer(row: Row) -> bool:
    counts = _is_count(row.get("step")) and _is_count(row.get("row"))
    return counts and isinstance(row.get("stage"), str) and isinstance(row.get("correct"), bool)


def _answer(row: Row) -> HeldOutAnswer:
    expected = row.get("expected")
    return HeldOutAnswer(
        stage=row["stage"],
        step=row["step"],
        row=row["row"],
        prompt_id=str(row.get("prompt_id", row["row"])),
        prompt=row.get("prompt"),
        task=str(row.get("task", "")),
        expected=None if expected is None else str(expected),
        answer=str(row.get("answer", "")),
        correct=row["correct"],
        reward=float(row["reward"]) if is_number(row.get("reward")) else None,
    )


def prompt_text(prompt: Any) -> str:
    """Return a prompt row as text: its question, its turns, else its JSON."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        for name in ("question", "prompt", "problem", "instruction", "messages"):
            if prompt.get(name):
                return prompt_text(prompt[name])
    if (
        isinstance(prompt, Sequence)
        and prompt
        and all(isinstance(turn, Mapping) for turn in prompt)
    ):
        return "\n".join(
            f"{turn.get('role', '?')}: {_content(turn.get('content'))}" for turn in prompt
        )
    return json.dumps(prompt, ensure_ascii=False)


def _content(value: Any) -> str:
    if isinstance(value, list):
        with contextlib.suppress(AttributeError):  # parts of a message: {"type": "text", "text": …}
            return " ".join(str(part.get("text", part)) for part in value)
    return str(value)
