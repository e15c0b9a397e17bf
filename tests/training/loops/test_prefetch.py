"""Batches prepared ahead by a thread: order, bound, failures, and that nothing stays behind."""

import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from rollouts.training.loops.prefetch import prefetch

pytestmark = pytest.mark.parametrize("runtime", ["asyncio", "trio"])


def run(runtime: str, function: Callable[[], Any]) -> Any:
    return anyio.run(function, backend=runtime)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_steps_come_in_order_from_one_thread(runtime: str) -> None:
    """Goal: deterministic order, whatever the depth; more depth than steps too. Red with `pop` from the wrong end."""

    async def main(depth: int) -> list[tuple[int, Any]]:
        async with prefetch(
            lambda step: (step * 10, threading.current_thread().name), range(3, 8), depth=depth
        ) as prepared:
            return [item async for item in prepared]

    for depth in (1, 2, 9):
        taken = run(runtime, lambda depth=depth: main(depth))
        assert [(step, value) for step, (value, _) in taken] == [
            (step, step * 10) for step in range(3, 8)
        ]
        assert len({name for _, (_, name) in taken}) == 1 and taken[0][1][1].startswith("prefetch")
        assert threads() == []


def test_it_works_ahead_but_never_more_than_depth(runtime: str) -> None:
    """Goal: `depth` steps ready while one trains, not more: memory is bounded. Red without the bound (all 20 ran)."""
    started: list[int] = []
    reached = threading.Semaphore(0)

    def prepare(step: int) -> int:
        started.append(step)
        reached.release()
        return step

    async def main() -> None:
        async with prefetch(prepare, range(20), depth=3) as prepared:
            for _ in range(3):  # ahead, before anything was taken
                assert await anyio.to_thread.run_sync(reached.acquire, True, 30)
            async for step, _ in prepared:
                if step < 17:
                    assert await anyio.to_thread.run_sync(reached.acquire, True, 30)
                assert started == list(range(min(step + 4, 20)))

    run(runtime, main)


def test_a_failure_surfaces_at_its_step(runtime: str) -> None:
    """Goal: the steps before it train; its own take raises what `prepare` raised, and goes on raising it.

    Red with the futures' exceptions raised as soon as they are there.
    """
    failed = threading.Event()

    def prepare(step: int) -> int:
        if step == 3:
            failed.set()
            raise ValueError("row 3 is broken")
        return step

    async def main() -> list[int]:
        taken = []
        async with prefetch(prepare, range(6), depth=4) as prepared:
            assert await anyio.to_thread.run_sync(failed.wait, 30)
            for _ in range(3):
                taken.append((await anext(prepared))[0])
            for _ in range(2):
                with pytest.raises(ValueError, match="row 3 is broken"):
                    await anext(prepared)
        return taken

    assert run(runtime, main) == [0, 1, 2]
    assert threads() == []


@pytest.mark.parametrize("how", ["break", "error", "cancelled while waiting"])
def test_leaving_early_leaves_no_thread(runtime: str, how: str) -> None:
    """Goal: whatever ends the loop, the thread ends with it, and steps nobody wants are not prepared.

    Red without the shutdown (threads stayed), and with it unshielded (cancelled: the thread was still running);
    without the mark that the block has ended, all fifty steps ahead were prepared.
    """
    prepared_steps: list[int] = []
    waiting, go_on, never = threading.Event(), threading.Event(), threading.Event()

    def prepare(step: int) -> int:
        prepared_steps.append(step)
        if step == 2:
            waiting.set()
            assert go_on.wait(200)
        elif step > 2:  # slow, so that the end of the block comes long before the last of these
            never.wait(0.2)
        return step

    async def take(scope: anyio.CancelScope) -> None:
        async with prefetch(prepare, range(100), depth=50) as prepared:
            async for step, _ in prepared:
                if step == 1 and how != "cancelled while waiting":
                    assert await anyio.to_thread.run_sync(waiting.wait, 200)
                    go_on.set()
                    if how == "error":
                        raise KeyError("the step failed")
                    break

    async def cancel(scope: anyio.CancelScope) -> None:
        assert await anyio.to_thread.run_sync(waiting.wait, 200)
        scope.cancel()
        go_on.set()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            if how == "cancelled while waiting":
                group.start_soon(cancel, group.cancel_scope)
            await take(group.cancel_scope)

    if how == "error":
        with pytest.raises(BaseExceptionGroup) as raised:
            run(runtime, main)
        assert raised.group_contains(KeyError)
    else:
        run(runtime, main)
    assert threads() == []
    assert len(prepared_steps) < 50


def test_other_tasks_run_while_it_waits(runtime: str) -> None:
    """Goal: a slow `prepare` does not block the event loop. Red (hung until its timeout) with a plain `result()`."""
    go_on = threading.Event()

    async def main() -> int:
        async def release() -> None:
            go_on.set()

        async with (
            prefetch(lambda step: go_on.wait(200) and step, [7], depth=1) as prepared,
            anyio.create_task_group() as group,
        ):
            group.start_soon(release)
            step, value = await anext(prepared)
        assert value == step
        return step

    assert run(runtime, main) == 7
