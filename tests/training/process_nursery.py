"""Starts real processes in no time: one Python that has imported torch and forks for each `python -m module argv`.

    Nursery() → start(module, argv, log) → pid → kill -9, or wait for its end

A fork is a process of its own: what SIGKILL leaves of it is only what it had written. Its random generators are
scrambled first, as those of a fresh process might be; nothing that must be exact may hang on them.
"""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "torch",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "uvicorn",
    "rollouts.engines.embedded.server",
    "rollouts.engines.embedded.model",
    "rollouts.training.backends.pytorch",
    "rollouts.training.datasets.dataset_loaders",
    "rollouts.training.evaluation",
    "rollouts.training.loops",
    "rollouts.training.metrics",
    "rollouts.training.rollout_gen.async_rollout_manager",
    "rollouts.training.rollout_gen.engine_generate",
    "rollouts.worker.trainer",
)


class Nursery:
    """Use as a context manager; on exit every process that still runs is killed."""

    def __enter__(self) -> "Nursery":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.process_nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running: set[int] = set()
        return self

    def __exit__(self, *_: Any) -> None:
        for pid in list(self._running):
            self.kill(pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, module: str, argv: list[str], log: Path) -> int:
        """The pid of `python -m module argv...`, its output in `log`."""
        pid = int(self._ask({"start": module, "argv": argv, "log": str(log)}))
        self._running.add(pid)
        return pid

    def kill(self, pid: int) -> int:
        """kill -9, and wait until it is gone; -9, or the exit code of one that had ended by itself."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def wait(self, pid: int) -> int:
        """The exit code once it has ended; minus the signal that ended it."""
        self._running.discard(pid)
        return int(self._ask({"wait": pid}))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery died"
        return json.loads(answer)


def main() -> None:
    for module in PRELOADED:
        __import__(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _run(request["start"], request["argv"], request["log"])
        print(json.dumps(answer), flush=True)


def _run(module: str, argv: list[str], log: str) -> None:
    """In the fork: become `python -m module argv`; never returns."""
    code: Any = 1
    try:
        with open(os.devnull) as nothing, open(log, "wb", buffering=0) as output:
            os.dup2(nothing.fileno(), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        _scramble()
        sys.argv = [module, *argv]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _scramble() -> None:
    import numpy as np
    import torch

    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


if __name__ == "__main__":
    main()
