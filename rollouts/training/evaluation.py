"""Greedy accuracy and pass@k on held-out rows, per task, through engines or in process. Losses: loops/validation.py.

Both ways decode and count the same thing, so the same weights give the same greedy number. Every row and every last
partial batch counts. Sampled answers are drawn from seeds of their own: an evaluation changes no training run.
"""

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from rollouts.training import rewards
from rollouts.training.datasets.chat import render_prompt
from rollouts.training.in_process_answers import evaluating, generate_answers, seeded
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.rollout_gen.async_rollout_manager import group_seed
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.rollout_gen.engine_generate import (
    prompt_id,
    refuse_abort,
    response_text,
    stop_ids,
)
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt, Sample

if TYPE_CHECKING:
    from torch import nn

ALL_TASKS = "all"  # the name under which the rows of every task are counted together

ScoreFn = Callable[[Sample], float]
T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled for each row, beside the greedy one; pass@k is estimated from them."""

    num_samples: int  # per row
    temperature: float = 1.0
    top_k: int = -1  # among the k likeliest tokens; -1: all
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The answers and their verdicts, in the order of the rows."""

    tasks: list[str]  # of each row
    responses: list[str]  # the greedy answers
    right: list[bool]  # whether each of those is right
    num_samples: int  # sampled answers per row; 0 without sampling
    num_right: list[int]  # how many of those are right, per row
    rewards: list[float] = field(default_factory=list)  # of agents: what each greedy episode earned

    @property
    def num_rows(self) -> int:
        return len(self.right)

    @property
    def exact_match(self) -> float:
        """Return the share of all rows whose greedy answer is right, 0 to 1."""
        return statistics.fmean(self.right)

    def metrics(self, ks: Sequence[int] = ()) -> dict[str, dict[str, float]]:
        """Return by task: "exact_match" and "pass@k" for each of `ks`, means over its rows, 0 to 1; "reward" of agents.

        "all" counts every row once and comes first; the tasks follow where there is more than one. Raises ValueError
        for a k that is not within 1 and the number of sampled answers.
        """
        for k in ks:
            if not 1 <= k <= self.num_samples:
                raise ValueError(
                    f"pass@{k}: needs 1 <= k <= {self.num_samples}, the sampled answers of each row"
                )
        found = {}
        for task, rows in by_task(range(self.num_rows), self.tasks).items():
            found[task] = {"exact_match": statistics.fmean(self.right[row] for row in rows)}
            if self.rewards:
                found[task]["reward"] = statistics.fmean(self.rewards[row] for row in rows)
            for k in ks:
                shares = [pass_at_k(self.num_samples, self.num_right[row], k) for row in rows]
                found[task][f"pass@{k}"] = statistics.fmean(shares)
        return found


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return an unbiased estimate of the chance that one of `k` answers is right: 1 - C(n - c, k) / C(n, k).

    n = `num_samples` were drawn, of which c = `num_right` are right (Chen et al. 2021, arXiv 2107.03374 eq. 1). The
    binomials are a product of ratios here, which neither overflows nor cancels. Raises ValueError unless
    1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(
            f"pass_at_k(n={num_samples}, c={num_right}, k={k}): needs 1 <= k <= n and 0 <= c <= n"
        )
    none_right = 1.0
    for drawn in range(k):
        none_right *= max(0, num_samples - num_right - drawn) / (num_samples - drawn)
    return 1.0 - none_right


def task_of(item: Prompt | Sample) -> str:
    """Return the task of a row, or of a Sample (its metadata first): its "task", else its format, else "all"."""
    if isinstance(item, Sample):
        return str(item.metadata.get("task") or task_of(item.prompt))
    row = {} if isinstance(item, str) else item
    return str(row.get("task") or row.get("format") or ALL_TASKS)


def by_task(items: Sequence[T], tasks: Sequence[str]) -> dict[str, list[T]]:
    """Return `items` by task, tasks in the order of their names; first all of them, under "all".

    Where all belong to one task, "all" is the only key.
    """
    groups: dict[str, list[T]] = {ALL_TASKS: list(items)}
    if len(set(tasks)) > 1:
        for task in sorted(set(tasks)):
            # a row's own column may have that name
            name = f"{task} (task)" if task == ALL_TASKS else task
            groups[name] = [
                item for item, its_task in zip(items, tasks, strict=True) if its_task == task
            ]
    return groups


def mix_tasks(loaded: Sequence[tuple[str, Sequence[T]]], *, seed: int) -> list[T]:
    """Return the prompt rows, or the Samples, of several (task, items) in one seeded order, each with its task.

    A row's own "task" stays. The order mixes the tasks, so that the first N items are a sample of all of them.
    """
    items = [_with_task(item, task) for task, its_items in loaded for item in its_items]
    random.Random(seed).shuffle(items)
    return items


def _with_task(item: Any, task: str) -> Any:
    if isinstance(item, Sample):
        return replace(item, metadata={"task": task, **item.metadata})
    return {"task": task, **item}


def answer_records(rows: Sequence[Prompt], found: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield a plain record for each held-out row: place and id, the same at every step, the answer, the verdict."""
    for place, (row, task) in enumerate(zip(rows, found.tasks, strict=True)):
        expected = row.get("answer") if isinstance(row, Mapping) else None
        yield {
            "row": place,
            "prompt_id": prompt_id(row),
            "task": task,
            "prompt": row,
            "expected": expected,
            "answer": found.responses[place],
            "correct": found.right[place],
            **(
                {"num_samples": found.num_samples, "num_correct": found.num_right[place]}
                if found.num_samples
                else {}
            ),
            **({"reward": found.rewards[place]} if found.rewards else {}),
        }


def exact_match(responses: Sequence[str], answers: Sequence[str]) -> float:
    """Return the share of responses equal to their answer, but for white space. Raises ValueError for no rows."""
    if len(responses) != len(answers) or not responses:
        raise ValueError(
            f"exact_match: {len(responses)} responses for {len(answers)} answers; needs as many, at least one"
        )
    return sum(a.strip() == b.strip() for a, b in zip(responses, answers, strict=True)) / len(
        responses
    )


async def evaluate_with_engine(
    engines: EnginePool | Sequence[object],
    tokenizer: Tokenizer,
    rows: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    score_fn: ScoreFn = rewards.is_correct,
    rows_per_request: int = 128,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Return the answers of a pool, or of clients like `weight_sync.SGLangEngine`; chunks of rows go to them in turn.

    An answer is right when score_fn gives 1.0. Each engine has one request in flight. A row's sampled answers follow
    from `sampling.seed` and its place alone. Raises ValueError for no rows, and what the client raises.
    """
    pool = EnginePool.of(engines)
    _require(rows, sampling, pool)
    greedy = {
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": stop_ids(tokenizer, stop_token_ids),
    }
    prompts = [render_prompt(tokenizer, row) for row in rows]
    limiters = [anyio.CapacityLimiter(1) for _ in range(len(pool))]

    async def answer(chunk: int, params: Sequence[Mapping[str, Any]], n: int) -> list[list[str]]:
        place = chunk % len(pool)
        part = slice(chunk * rows_per_request, (chunk + 1) * rows_per_request)
        async with limiters[place]:
            groups = await pool.generate_batch(
                prompts[part], params[part], n=n, return_logprob=False, first=place
            )
        for generation in itertools.chain.from_iterable(groups):
            refuse_abort(generation, pool)
        return [[response_text(generation, tokenizer) for generation in group] for group in groups]

    async def answers(params: Sequence[Mapping[str, Any]], n: int) -> list[list[str]]:
        chunks = range(-(-len(rows) // rows_per_request))
        parts = await gather_in_order([partial(answer, chunk, params, n) for chunk in chunks])
        return list(itertools.chain.from_iterable(parts))

    responses = [one for (one,) in await answers([{**greedy, "temperature": 0.0}] * len(rows), 1)]
    sampled: list[list[str]] = [[] for _ in rows]
    if sampling:
        drawn = {**greedy, "temperature": sampling.temperature, "top_k": sampling.top_k}
        params = [
            {**drawn, "sampling_seed": group_seed(sampling.seed, row)} for row in range(len(rows))
        ]
        sampled = await answers(params, sampling.num_samples)
    return _evaluation(rows, responses, sampled, score_fn)


def evaluate_with_model(
    model: "nn.Module",
    tokenizer: Tokenizer,
    rows: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    score_fn: ScoreFn = rewards.is_correct,
    batch_size: int = 256,
    batch_tokens: int = 2**17,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Return the answers of a model in this process: left-padded `model.generate` of `batch_size` sequences at once.

    With padding and the longest answers, a batch has at most `batch_tokens` tokens (a single sequence may have more).

    Of the model's own generation_config only the tokens that end a turn count (Qwen's penalises repetition). The
    model's training mode and the global random state stay. Sampled answers follow from `sampling.seed`, `batch_size`
    and `batch_tokens`.
    """
    _require(rows, sampling)
    stops = stop_ids(tokenizer, stop_token_ids, model)
    generate = partial(
        generate_answers, model, tokenizer, rows, stops=stops, max_new_tokens=max_new_tokens
    )
    with evaluating(model):
        responses = [one for (one,) in generate((batch_size, batch_tokens), n=1, do_sample=False)]
        sampled: list[list[str]] = [[] for _ in rows]
        if sampling:
            with seeded(sampling.seed, model):
                sampled = generate(
                    (
                        max(1, batch_size // sampling.num_samples),
                        batch_tokens // sampling.num_samples,
                    ),
                    n=sampling.num_samples,
                    do_sample=True,
                    temperature=float(sampling.temperature),
                    top_k=0 if sampling.top_k == -1 else sampling.top_k,
                    top_p=1.0,
                )
    return _evaluation(rows, responses, sampled, score_fn)


def _require(
    rows: Sequence[Prompt], sampling: Sampling | None, pool: EnginePool | None = None
) -> None:
    if not rows:
        raise ValueError("evaluation: no rows; needs at least one")
    if pool is not None and not pool:
        raise ValueError("evaluation: engines is empty; needs at least one")
    if sampling is not None and (sampling.num_samples < 1 or sampling.temperature <= 0):
        raise ValueError(
            f"{sampling}: needs num_samples >= 1 and temperature > 0; None for the greedy answer alone"
        )


def _evaluation(
    rows: Sequence[Prompt], responses: list[str], sampled: list[list[str]], score_fn: ScoreFn
) -> Evaluation:
    def is_right(row: Prompt, text: str) -> bool:
        return rewards.is_full(score_fn(Sample(prompt=row, response=text)))

    return Evaluation(
        tasks=[task_of(row) for row in rows],
        responses=responses,
        right=[is_right(row, text) for row, text in zip(rows, responses, strict=True)],
        num_samples=len(sampled[0]),
        num_right=[
            sum(is_right(row, text) for text in texts)
            for row, texts in zip(rows, sampled, strict=True)
        ],
    )
