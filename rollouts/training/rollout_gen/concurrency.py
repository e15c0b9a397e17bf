"""Run async calls together and get their results in order. asyncio and trio alike."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio


async def gather_in_order(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Run all `calls` at once and return their results, in order, when the slowest is done.

    The first error cancels the rest and is raised as it is, not in a group; its notes name the others.
    """
    results: list[Any] = [None] * len(calls)

    async def run(index: int) -> None:
        results[index] = await calls[index]()

    try:
        async with anyio.create_task_group() as tasks:
            for index in range(len(calls)):
                tasks.start_soon(run, index)
    except BaseExceptionGroup as group:
        error = representative(group)
        raise error from error.__cause__
    return results


def representative(group: BaseExceptionGroup) -> BaseException:
    """Choose which exception to raise: KeyboardInterrupt and the like before ordinary errors."""
    first, *others = sorted(group.exceptions, key=lambda error: isinstance(error, Exception))
    for other in others[:3]:
        first.add_note(f"at the same time: {type(other).__name__}: {other}")
    if len(others) > 3:
        first.add_note(f"and {len(others) - 3} more errors")
    return first
