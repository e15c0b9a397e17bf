"""torchrun's entry: record this process, read config.json, build the stage, run it.

    torchrun -m rollouts.worker.trainer --run-dir RUN_DIRECTORY --stage sft|rl [--engine-url URL ...] [--router-url URL]
        [--receiver-url URL ...]

Every rank runs this. Rank 0 writes metrics, evaluations, samples and events into the run directory, and talks to the
engines. A mistake of the user's ends the run with one `error:` line and exit code 1; a fault of ours with a traceback.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio

from rollouts.config import Config
from rollouts.run_dir import FULL_DISK, RunDir, append_event, record_process
from rollouts.training import open_files
from rollouts.training.user_code import find_user_code
from rollouts.worker.builders import EngineUrls, StageName
from rollouts.worker.stages import StageModule


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The trainer of one stage; torchrun starts it on every rank."
    )
    parser.add_argument("--run-dir", required=True, type=Path, help="the run directory")
    parser.add_argument("--stage", required=True, choices=("sft", "rl"))
    parser.add_argument(
        "--engine-url",
        action="append",
        default=[],
        help="an inference server; rl needs at least one",
    )
    parser.add_argument(
        "--router-url",
        help="SGLang's router in front of them, through which they get their requests",
    )
    parser.add_argument(
        "--receiver-url",
        action="append",
        default=[],
        help="what takes weights for the engines of another host",
    )
    arguments = parser.parse_args()
    find_user_code()
    run = RunDir(arguments.run_dir)
    record_process(run, f"{arguments.stage}-trainer-rank{_rank()}")
    config = Config.load(run.config)
    logging.basicConfig(level=config.output.log_level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line per request, at INFO
    open_files.allow_all()  # a connection for each request under way
    module = _stage_module(arguments.stage)
    with _mistakes_in_one_line(run, module.MISTAKES):
        urls = EngineUrls(arguments.engine_url, arguments.router_url, arguments.receiver_url)
        anyio.run(_train, module, config, run, urls)
    return 0


def _stage_module(stage: StageName) -> StageModule:
    """Import a stage's module: late, since it loads torch, and by then this process is on record and can be stopped."""
    if stage == "sft":
        from rollouts.worker.stages import sft

        return sft
    from rollouts.worker.stages import rl

    return rl


async def _train(module: StageModule, config: Config, run: RunDir, urls: EngineUrls) -> None:
    async with module.build(config, run, urls) as stage:
        await stage.run()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _mistakes_in_one_line(run: RunDir, mistakes: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what a user can mend into an `error:` line and an event; other errors are ours and keep their traceback."""
    try:
        yield
    except mistakes as error:
        _report(run, str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        _report(run, f"no space left on device: {error.filename or run.path}")
        sys.exit(1)


def _report(run: RunDir, message: str) -> None:
    """Write the message to the log, and as the event that the supervisor takes the run's message from."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if _rank() == 0:
        with contextlib.suppress(OSError):  # a full disk: the supervisor reads the log
            append_event(run, "error", message=message, window="trainer", log_tail=[])


if __name__ == "__main__":
    sys.exit(main())
