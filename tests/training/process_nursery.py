"""Starts real processes in no time: one Python that has imported torch and forks for each `python -m module argv`.

    shared() → start(module, argv, log) → pid → kill -9, or wait for its end
    shared() → torchrun(ranks, module, argv, directory): ranks of one world, waited for

A fork is a process of its own: what SIGKILL leaves of it is only what it had written. Its random generators are
scrambled first, as those of a fresh process might be; nothing that must be exact may hang on them.
"""

import atexit
import contextlib
import functools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "torch",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "uvicorn",
    "rollouts.engines.embedded.server",
    "rollouts.engines.embedded.served_model",
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
    """One such Python. `close` ends it and every process that still runs; so does the end of this process."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.process_nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=200)

    def start(
        self,
        module: str,
        argv: list[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """The pid of `python -m module argv...`, its output in `log`, with `environment` beside what it has."""
        return int(
            self._ask(
                {
                    "start": module,
                    "argv": argv,
                    "log": str(log),
                    "environment": dict(environment or {}),
                }
            )
        )

    def torchrun(self, ranks: int, module: str, argv: list[str], directory: Path) -> None:
        """Run the module on each rank of a world, as torchrun would start it; AssertionError shows a rank that failed.

        A rank that waits for one that has failed ends by the time limit of its group.
        """
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        logs = [directory / f"rank_{rank}.log" for rank in range(ranks)]
        pids = [
            self.start(
                module, argv, log, environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, log in enumerate(logs)
        ]
        codes = [self.wait(pid) for pid in pids]
        said = [
            f"{log.name}: {code}\n{log.read_text()[-3000:]}"
            for log, code in zip(logs, codes, strict=True)
        ]
        assert not any(codes), "\n".join(said)

    def kill(self, pid: int) -> int:
        """kill -9, and wait until it is gone; -9, or the exit code of one that had ended by itself."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def wait(self, pid: int) -> int:
        """The exit code once it has ended; minus the signal that ended it."""
        return int(self._ask({"wait": pid}))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the nursery died"
        return json.loads(answer)


@functools.cache
def shared() -> Nursery:
    """The one of this test session, made when it is first asked for: its imports take seconds."""
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


def has_ended(pid: int) -> bool:
    """Has a process that is not waited for yet ended?"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def main() -> None:
    for module in PRELOADED:
        __import__(module)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os.environ.update(request["environment"])
                _run(request["start"], request["argv"], request["log"])
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
    except Exception:
        traceback.print_exc()
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
