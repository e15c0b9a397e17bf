"""Processes that run a plain reward function, so that a slow or fatal call can be cut off. asyncio and trio alike."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Pipe
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from rollouts.training.rewards.reward_fn import RewardError
from rollouts.training.types import REWARD_FAILURE, Sample

START_TIMEOUT_S = 300.0  # a worker's imports; torch's take a minute on a slow disk


class RewardWorkers:
    """An async reward function that runs a plain one in processes: `await reward_workers(sample)`.

    They start as needed, `workers` at most, from this interpreter and its sys.path. They import the function by its
    path, so only samples are pickled. A process over the time limit, or whose call was cancelled, is killed with its
    children. It may be used from several event loops in turn. `close` kills all of them.
    """

    def __init__(self, dotted_path: str, *, workers: int, timeout_s: float) -> None:
        self._path = dotted_path
        self._timeout_s = timeout_s
        self._workers = workers
        # each belongs to an event loop
        self._limiters: RunVar[anyio.CapacityLimiter] = RunVar("reward_workers")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> "RewardWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker. The tasks of calls under way end before this."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    async def __call__(self, sample: Sample) -> float | None:
        """Score a sample. Raises RewardError for what the function raised, naming it and the prompt."""
        call = _Call()
        limiter = self._limiters.get(None) or anyio.CapacityLimiter(self._workers)
        self._limiters.set(limiter)
        try:
            kind, value = await anyio.to_thread.run_sync(
                self._score, sample, call, abandon_on_cancel=True, limiter=limiter
            )
        finally:
            call.end()  # the thread of a cancelled call is still there, and ends with the worker
        if kind == "value":
            return value
        if kind == "error":
            raise raised(self._path, value, sample)
        mark_failed(sample, kind)
        return None

    def _score(self, sample: Sample, call: "_Call") -> tuple[str, Any]:
        """Run in a thread; return ("value", number or None), ("error", what), or a failure's name and None."""
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
    """The worker that a call uses, so that its cancellation, in another thread, can kill it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._ended = False

    def begin(self, worker: "_Worker") -> bool:
        """Note the worker. Return False, with the worker killed, if the call was cancelled before."""
        with self._lock:
            self._worker = worker
            ended = self._ended
        if ended:
            worker.kill()
        return not ended

    def release(self) -> bool:
        """Let the worker go. Return False if the call was cancelled."""
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
    """One process. Its first message says that it is ready; then it answers each sample once."""

    def __init__(self, dotted_path: str) -> None:
        self._connection, theirs = Pipe()
        command = [
            sys.executable,
            "-m",
            "rollouts.training.rewards.worker_process",
            dotted_path,
            str(theirs.fileno()),
        ]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_same_search_path()},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # its children are killed with it, and Ctrl-C reaches this process alone
            )
        self._ready = False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, sample: Sample, timeout_s: float) -> tuple[str, Any]:
        """Return the worker's answer. `timeout_s` starts once the worker is ready."""
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
            return (
                self._connection.recv()
                if self._connection.poll(timeout_s)
                else ("reward_timeout", None)
            )
        except (EOFError, OSError):
            return "reward_death", None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # The connection is not closed here: under a waiting thread that would free its file descriptor's number.


def raised(dotted_path: str, what: str, sample: Sample) -> RewardError:
    """Return the error for a reward that raised `what`."""
    return RewardError(f"{dotted_path} raised {what} for prompt {str(sample.prompt)[:200]}")


def mark_failed(sample: Sample, how: str) -> None:
    """Note why a sample is not scorable, for the rollout manager to count."""
    sample.metadata[REWARD_FAILURE] = how


def _same_search_path() -> dict[str, str]:
    """Return the variables with which a Python finds the modules that this one does."""
    safe = {"PYTHONSAFEPATH": "1"} if sys.flags.safe_path else {}
    return {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), **safe}
