"""rollouts.jsonl, one line per sample: how the RL loop writes it, and how it is trained on again without an engine.

A step's samples stand together, its groups in order. Numbers are written so that they read back as the same floats.
docs/reference/run-directory.md lists the fields. Effects: `ReplayRollouts` reads its file.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.data_formats.row import DataError
from rollouts.training.types import RewardFn, RolloutBatch, Sample

if TYPE_CHECKING:
    from torch import Tensor

DECIMALS = 6  # of the trainer's log-probs
SHOWN_METADATA = ("prompt_id", "weight_version", "finish_reason")  # metadata with fields of its own


def sample_records(
    batch: RolloutBatch,
    advantages: Sequence[float] | None,
    temperature: float,
    trainer: "Tensor | None" = None,
) -> Iterator[dict[str, Any]]:
    """Return a record for each sample of a step's `batch`, with all that training on it again needs.

    `temperature` is the sampler's, at which `rollout_log_probs` were taken. `advantages` is one per sample; None where
    there are none, or they are per token, which a value model makes anew. `trainer` are the trainer's log-probs [B, T].
    """
    groups = batch.group_ids or [0] * len(batch.samples)
    scores = [None] * len(batch.samples) if advantages is None else advantages
    columns = zip(batch.samples, groups, batch.rewards, scores, strict=True)
    for place, (sample, group, reward, advantage) in enumerate(columns):
        others = {key: value for key, value in sample.metadata.items() if key not in SHOWN_METADATA}
        yield {
            "prompt": sample.prompt,
            "response": sample.response,
            "tokens": sample.tokens,
            "response_length": sample.response_length,
            "loss_mask": sample.loss_mask,
            "rollout_log_probs": sample.rollout_log_probs,
            "trainer_log_probs": None if trainer is None else _of_response(trainer[place], sample),
            "temperature": temperature,
            "reward": reward,
            "advantage": advantage,
            "group": group,
            "step_samples": len(batch.samples),
            **{key: sample.metadata[key] for key in SHOWN_METADATA if key in sample.metadata},
            "metadata": others,
        }


def _of_response(log_probs_T: "Tensor", sample: Sample) -> list[float | None]:
    """Return a response's log-probs, rounded: they are for people. None for what was not trained on."""
    end = len(sample.tokens)
    values = log_probs_T[end - sample.response_length : end].double().round(decimals=DECIMALS)
    return [None if math.isnan(value) else value for value in values.tolist()]


def read_sample(record: Mapping[str, Any], where: str) -> tuple[Sample, int]:
    """Return the Sample of a record, with its reward, and its group. Raises DataError naming `where` for what does not
    fit."""
    try:
        shown = {key: record[key] for key in SHOWN_METADATA if key in record}
        sample = Sample(
            prompt=record["prompt"],
            response=record["response"],
            tokens=record["tokens"],
            loss_mask=record["loss_mask"],
            reward=float(record["reward"]),
            rollout_log_probs=record["rollout_log_probs"],
            metadata={**shown, **record["metadata"]},
            response_length=record["response_length"],
        )
        if None in (sample.rollout_log_probs or ()):
            raise ValueError(
                "rollout_log_probs holds null, which stands for a number that was not finite"
            )
        return sample, int(record["group"])
    except KeyError as error:
        raise DataError(
            f"{where}: has no {error}; needs a line of a rollouts.jsonl, as the RL loop writes it"
        ) from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: no sample that can be trained on: {error}") from None


@dataclass
class _Step:
    """Where a step's lines stand in the file."""

    number: int
    offset: int  # bytes
    first_line: int  # from 1
    lines: int = 0
    samples: int = 0  # that the step had, as each of its lines says
    torn_line: int | None = None  # a line that is no JSON: what a killed writer left


class ReplayRollouts:
    """Stands where `run_rl_training` has a rollout manager, and gives the batches of a saved rollouts.jsonl, in order.

    Each batch is one step of the recorded run, its samples as they were; after the last the first comes again. Rewards
    are the recorded ones, unless `generate_batch` is given a `reward_fn` to score anew with. A step that stands in the
    file twice counts where it stands last: the run was resumed before it. Raises DataError, naming file and line, for
    a file that does not exist, holds no step, or holds one in part.
    """

    def __init__(self, path: Path | str, *, temperature: float) -> None:
        """`temperature` is the one that training divides the logits by: it must be the recorded one."""
        self.path = Path(path)
        self._temperature = temperature
        self._steps, self.fingerprint = _index(self.path)
        self._position = 0  # batches given

    def __len__(self) -> int:
        """Steps in the file."""
        return len(self._steps)

    async def generate_batch(self, reward_fn: RewardFn | None = None) -> RolloutBatch:
        """Return the next step's batch. `reward_fn`, plain or async, scores it anew."""
        step = self._steps[self._position % len(self._steps)]
        samples, groups = [], []
        for where, line in _lines(self.path, step):
            record = json.loads(line)
            sample, group = read_sample(record, where)
            if record.get("temperature") != self._temperature:
                raise DataError(
                    f"{where}: was sampled at temperature {record.get('temperature')}, and is to be trained on at "
                    f"{self._temperature}: its log-probs would not be comparable. Set the recorded one."
                )
            if reward_fn is not None:
                reward: Any = reward_fn(sample)
                sample.reward = float(await reward if inspect.isawaitable(reward) else reward)
            samples.append(sample)
            groups.append(group)
        self._position += 1
        return RolloutBatch(
            tokens=[sample.tokens for sample in samples],
            loss_masks=[sample.loss_mask for sample in samples],
            rewards=[sample.reward for sample in samples if sample.reward is not None],
            response_lengths=[sample.response_length for sample in samples],
            metadata={"groups_kept": len(set(groups))},
            samples=samples,
            group_ids=groups,
        )

    def save_state(self) -> dict[str, Any]:
        """JSON-able: how many batches were given, and of which file."""
        return {"position": self._position, "fingerprint": self.fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that would have come. Raises DataError when the state is of another file."""
        if state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"{self.path}: holds other rollouts (fingerprint {self.fingerprint}) than the run to be resumed read "
                f"({state.get('fingerprint')}). Fix: resume with the same file, or start afresh."
            )
        self._position = int(state["position"])


def _index(path: Path) -> tuple[list[_Step], str]:
    """Return every step of the file in the order of its number, and a fingerprint of the whole file."""
    steps: dict[int, _Step] = {}
    digest = hashlib.sha256()
    current: _Step | None = None
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                try:
                    record = json.loads(line)
                    if current is None or record["step"] != current.number:
                        current = steps[record["step"]] = _Step(record["step"], offset, number)
                    current.lines += 1
                    current.samples = record["step_samples"]
                except ValueError:  # no JSON, or bytes that are no text
                    if current is not None:
                        current.torn_line = number
                except (KeyError, TypeError):
                    raise DataError(
                        f"{path}:{number}: no line of a rollouts.jsonl: has no step or step_samples"
                    ) from None
                offset += len(line)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror} (looked in {Path.cwd()})"
        ) from None
    if not steps:
        raise DataError(
            f"{path}: holds no rollouts; needs the rollouts.jsonl of a run that took a step"
        )
    ordered = [steps[number] for number in sorted(steps)]
    for step in ordered:
        _check_whole(path, step)
    return ordered, digest.hexdigest()[:16]


def _check_whole(path: Path, step: _Step) -> None:
    if step.torn_line is not None or step.lines != step.samples:
        line = step.torn_line or step.first_line + step.lines - 1
        raise DataError(
            f"{path}:{line}: step {step.number} has {step.lines} of its {step.samples} samples: its writer was killed. "
            "Fix: take the lines of this step out of the file."
        )


def _lines(path: Path, step: _Step) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        file.seek(step.offset)
        for number in range(step.first_line, step.first_line + step.lines):
            yield f"{path}:{number}", file.readline()
