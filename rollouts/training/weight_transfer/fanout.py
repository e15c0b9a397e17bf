"""The same call to several engines at once: all are waited for, and each that failed is named."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio

from rollouts.training.inference.http import EngineError, WeightSyncError

E = TypeVar("E")
T = TypeVar("T")


async def each(engines: Sequence[E], what: str, call: Callable[[E], Awaitable[T]]) -> list[T]:
    """`call(engine)` for all of them in parallel: the results, in order.

    Raises WeightSyncError, which says that `what` failed, and where, after all have answered.
    """
    results: dict[int, T] = {}
    failures: dict[int, Exception] = {}

    async def one(index: int, engine: E) -> None:
        try:
            results[index] = await call(engine)
        except EngineError as error:
            failures[index] = error

    async with anyio.create_task_group() as group:
        for index, engine in enumerate(engines):
            group.start_soon(one, index, engine)
    if failures:
        words = [f"{name_of(engines[index])}: {error}" for index, error in sorted(failures.items())]
        first = next(iter(failures.values()))
        raise WeightSyncError(
            f"{what} failed at {len(failures)} of {len(engines)} engines: {'; '.join(words)}"
        ) from first
    return [results[index] for index in range(len(engines))]


def name_of(engine: Any) -> str:
    return getattr(engine, "base_url", None) or repr(engine)
