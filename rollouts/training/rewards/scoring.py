"""A job's reward function with its time limit, in processes of its own where it is slow. asyncio and trio alike.

What takes too long, or kills the process it runs in, gives None: not scorable, which drops its group and is counted
as `reward_timeout` or `reward_death`. What raises is the user's mistake and ends the run, naming reward and prompt.
"""

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from rollouts.training.rewards.common import RewardError, resolve
from rollouts.training.types import REWARD_FAILURE, RewardFn, Sample
from rollouts.training.user_code import USER_ERRORS, describe

START_TIMEOUT_S = 300.0  # a worker's imports; torch's take a minute on a slow disk


@contextlib.contextmanager
def scoring(dotted_path: str, *, workers: int, timeout_s: float) -> Iterator[RewardFn]:
    """The reward function at `dotted_path`, as `RolloutConfig.reward_fn` takes it.

    An async one is cut off after `timeout_s` of a sample; so is a plain one in `workers` > 0 processes, which end with
    the context. With 0 it runs in this process and cannot be cut off: that it took too long is seen afterwards. Raises
    RewardError for a path that names nothing.
    """
    function = resolve(dotted_path)
    here = _InThisProcess(dotted_path, function, timeout_s)
    if _is_async(function):
        yield here.later
    elif workers == 0:
        yield here
    else:
        with RewardWorkers(dotted_path, workers=workers, timeout_s=timeout_s) as scored:
            yield scored


class _InThisProcess:
    """A reward function with its time limit, and what it raises as a RewardError that names it and the prompt.

    Gives what the function gives: a number or None, or for an async one something to be awaited for it.
    """

    def __init__(self, dotted_path: str, function: Callable[[Sample], Any], timeout_s: float) -> None:
        self._path, self._function, self._timeout_s = dotted_path, function, timeout_s

    def __call__(self, sample: Sample) -> Any:
        started = time.monotonic()
        with self._named(sample):
            value = self._function(sample)
        if inspect.isawaitable(value):
            return self._awaited(value, sample)
        if time.monotonic() - started > self._timeout_s:
            _failed(sample, "reward_timeout")
            return None
        return value

    async def later(self, sample: Sample) -> float | None:
        """Of an async function: that it is one is to be seen."""
        return await self(sample)

    async def _awaited(self, value: Awaitable[Any], sample: Sample) -> Any:
        with anyio.move_on_after(self._timeout_s), self._named(sample):
            return await value
        _failed(sample, "reward_timeout")
        return None

    @contextlib.contextmanager
    def _named(self, sample: Sample) -> Iterator[None]:
        try:
            yield
        except RewardError:  # says all there is to say
            raise
        except USER_ERRORS as error:
            raise _raised(self._path, describe(error), sample) from error


class RewardWorkers:
    """An async reward function that runs a plain one in processes: `await reward_workers(sample)`.

    They start as they are needed, `workers` at most, from this interpreter and its sys.path, and import the function
    by its path, so that nothing of it is pickled; samples are. One that is over the time limit, or whose call was
    cancelled, is killed with its children. It may be used from several event loops in turn. `close` kills them all.
    """

    def __init__(self, dotted_path: str, *, workers: int, timeout_s: float) -> None:
        self._path = dotted_path
        self._timeout_s = timeout_s
        self._workers = workers
        self._limiters: RunVar[anyio.CapacityLimiter] = RunVar("reward_workers")  # each belongs to an event loop
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> "RewardWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker. Calls under way belong to tasks, which end before this."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    async def __call__(self, sample: Sample) -> float | None:
        """Raises RewardError for what the function raised, naming it and the prompt."""
        call = _Call()
        limiter = self._limiters.get(None) or anyio.CapacityLimiter(self._workers)
        self._limiters.set(limiter)
        try:
            kind, value = await anyio.to_thread.run_sync(
                self._score, sample, call, abandon_on_cancel=True, limiter=limiter
            )
        finally:
            call.end()  # of a cancelled one the thread is still there, and ends with the worker
        if kind == "value":
            return value
        if kind == "error":
            raise _raised(self._path, value, sample)
        _failed(sample, kind)
        return None

    def _score(self, sample: Sample, call: "_Call") -> tuple[str, Any]:
        """In a thread: ("value", number or None), ("error", what), or a failure's name and None."""
        worker = self._take()
        if not call.begin(worker):
            return "reward_death", None
        reply = worker.ask(sample, self._timeout_s)
        with self._lock:
            keeps = reply[0] in ("value", "error") and not self._closed and call.release()
            if keeps:
                self._idle.append(worker)
        if not keeps:
            worker.kill()
        return reply

    def _take(self) -> "_Worker":
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return _Worker(self._path)
            if worker.is_alive():
                return worker
            worker.kill()  # died while idle: reap it


class _Call:
    """Which worker a call holds, so that its cancellation, in another thread, can kill it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._ended = False

    def begin(self, worker: "_Worker") -> bool:
        """False, with the worker killed, where the call was cancelled before it had one."""
        with self._lock:
            self._worker = worker
            ended = self._ended
        if ended:
            worker.kill()
        return not ended

    def release(self) -> bool:
        """The worker is free again; False where the call was cancelled."""
        with self._lock:
            self._worker = None
            return not self._ended

    def end(self) -> None:
        with self._lock:
            self._ended = True
            worker = self._worker
        if worker is not None:
            worker.kill()


class _Worker:
    """One process; its first message says that it is ready, then each sample has one answer."""

    def __init__(self, dotted_path: str) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "rollouts.training.rewards.worker", dotted_path, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # its children are killed with it, and Ctrl-C is ours to handle
            )
        self._ready = False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, sample: Sample, timeout_s: float) -> tuple[str, Any]:
        """Waits for the worker to be ready first; the time limit is the reward's alone."""
        if not self._ready:
            kind, what = self._receive(START_TIMEOUT_S)
            if kind != "ready":
                return "error", what or f"{kind} while its worker started"
            self._ready = True
        try:
            self._connection.send(sample)
        except OSError:
            return "reward_death", None
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> tuple[str, Any]:
        try:
            return self._connection.recv() if self._connection.poll(timeout_s) else ("reward_timeout", None)
        except (EOFError, OSError):
            return "reward_death", None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # the connection is closed by whoever reads it: closing it under a waiting thread would free its number


def serve(dotted_path: str, connection: Connection) -> None:
    """A worker's life: until the other end is closed."""
    try:
        function = resolve(dotted_path)
    except USER_ERRORS as error:  # told, not lost with this process
        connection.send(("error", describe(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            sample = connection.recv()
        except EOFError:
            return
        try:
            value = function(sample)
            reply: tuple[str, Any] = ("value", None if value is None else float(value))
        except USER_ERRORS as error:
            reply = ("error", describe(error))
        connection.send(reply)


def _raised(dotted_path: str, what: str, sample: Sample) -> RewardError:
    return RewardError(f"{dotted_path} raised {what} for prompt {str(sample.prompt)[:200]}")


def _failed(sample: Sample, how: str) -> None:
    """Not scorable; the rollout manager counts why."""
    sample.metadata[REWARD_FAILURE] = how


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
