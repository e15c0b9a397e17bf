"""Make the same call to several engines at once: all are waited for, and each failure is named."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import anyio

from rollouts.training.inference.http import EngineError, WeightSyncError


class Named(Protocol):
    @property
    def base_url(self) -> str: ...


class Updatable(Named, Protocol):
    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]: ...


E = TypeVar("E", bound=Named)
T = TypeVar("T")


async def on_all_engines(
    engines: Sequence[E], what: str, call: Callable[[E], Awaitable[T]]
) -> list[T]:
    """Await `call(engine)` for all of them in parallel. Return the results, in order.

    Raises WeightSyncError after all have answered. It says that `what` failed, and where.
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
        words = [f"{engines[index].base_url}: {error}" for index, error in sorted(failures.items())]
        first = next(iter(failures.values()))
        raise WeightSyncError(
            f"{what} failed at {len(failures)} of {len(engines)} engines: {'; '.join(words)}"
        ) from first
    return [results[index] for index in range(len(engines))]


async def update_all(
    engines: Sequence[Updatable],
    checkpoint_path: str,
    weight_version: str | None,
    *,
    elsewhere: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Have all engines load the checkpoint, in parallel. Return their answers, in order.

    `elsewhere`: by URL, where engines on other hosts have it.
    Raises WeightSyncError after all have answered, if any raised or did not answer with success true. It names them.
    """
    answers: list[dict[str, Any]] = [{} for _ in engines]
    failures: list[str] = []
    causes: list[Exception] = []

    async def update(index: int, engine: Updatable) -> None:
        try:
            answer: Any = await engine.update_weights_from_checkpoint(
                (elsewhere or {}).get(engine.base_url, checkpoint_path),
                weight_version=weight_version,
            )
        except Exception as error:
            # an engine of the user's may raise anything: that is its failure
            failures.append(f"{engine.base_url}: {error or type(error).__name__}")
            causes.append(error)
            return
        if not isinstance(answer, dict) or answer.get("success") is not True:
            failures.append(f"{engine.base_url}: answered {answer!r}, needs success true")
            return
        answers[index] = answer

    async with anyio.create_task_group() as group:
        for index, engine in enumerate(engines):
            group.start_soon(update, index, engine)
    if failures:
        count = f"{len(failures)} of {len(engines)} engines did not take {checkpoint_path}"
        raise WeightSyncError("; ".join([count, *failures])) from (causes[0] if causes else None)
    return answers
