"""`deploy ls` with 1,000 registered runs, and `deploy --help`: medians of whole processes.

    .venv/bin/python -m benchmarks.deploy_ls [--runs 1000] [--repeats 11]

The runs are of a host elsewhere, as `deploy` left them here: an entry in the registry, and a mirror with status,
metrics and events. One in five failed. Prints the medians in seconds, and the processor's seconds, which other programs
of the machine change less; fails if torch was imported.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rollouts.remote.run import registry
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import HOME_VARIABLE, RunDir, State, Status, append_jsonl, write_json_atomic

ROOT = Path(__file__).resolve().parent.parent
STATES: tuple[State, ...] = ("done", "done", "stopped", "running", "failed")
METRIC_ROWS, EVENT_ROWS = 100, 30
DAY_S = 86_400.0


def make_runs(directory: Path, count: int) -> None:
    """Register `count` runs in this process's home, the last of them an hour old; their mirrors lie in `directory`."""
    for number in range(count):
        experiment = f"experiment_{number % 7}"
        run_id = f"{experiment}-20260101-{number:06d}-{number * 2654435761 % 65536:04x}"
        started_at = time.time() - 3600 - (count - 1 - number) * DAY_S / 10
        entry = RunEntry(
            run_id=run_id,
            experiment_name=experiment,
            target=f"user@gpu-{number % 3}",
            home="/home/user/.rollouts",
            run_path=f"/home/user/.rollouts/runs/{run_id}",
            local_dir=str(directory / experiment / run_id),
            repository=str(directory),
            created_at=started_at,
        )
        _fill_mirror(entry.mirror, experiment, STATES[number % len(STATES)], started_at)
        registry.save(entry)


def _fill_mirror(run: RunDir, experiment: str, state: State, started_at: float) -> None:
    code = {"done": 0, "running": None}.get(state, 1)
    status = Status(
        run_id=run.run_id,
        experiment_name=experiment,
        state=state,
        stage="rl",
        message="all stages done" if state == "done" else "training",
        started_at=started_at,
        updated_at=started_at + 600,
        exit_code=code,
    )
    metrics = [
        {"stage": "rl", "step": n + 1, "time": started_at + n, "loss": 0.1}
        for n in range(METRIC_ROWS)
    ]
    events: list[dict[str, object]] = [
        {"time": started_at, "kind": "note", "message": "as usual"}
    ] * EVENT_ROWS
    events += (
        [{"time": started_at, "kind": "error", "message": "the trainer ended"}]
        if state == "failed"
        else []
    )
    run.path.mkdir(parents=True)
    write_json_atomic(run.status, status)
    append_jsonl(run.metrics, *metrics)
    append_jsonl(run.events, *events)


def medians_s(arguments: list[str], repeats: int) -> tuple[float, float]:
    """Return the median times of `deploy ARGUMENTS` as a process: by the clock, and of the processor.

    The first, with cold caches, does not count.
    """
    by_clock, of_processor = [], []
    for _ in range(repeats + 1):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "deploy.py"), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        by_clock.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        of_processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(by_clock[1:]), statistics.median(of_processor[1:])


def imports_torch(arguments: list[str]) -> bool:
    program = f"import sys; sys.argv = {['deploy', *arguments]!r}; import deploy\ntry: deploy.main()\nfinally: print()"
    program += "; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1] == "True"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ[HOME_VARIABLE] = f"{name}/home"
        make_runs(Path(name) / "runs", options.runs)
        print(f"medians of {options.repeats}, seconds; {options.runs} registered runs")
        for arguments in (["ls"], ["ls", "--json"], ["--help"]):
            torch = imports_torch(arguments)
            by_clock, of_processor = medians_s(arguments, options.repeats)
            words = f"{by_clock:.3f}, of the processor {of_processor:.3f}; torch: {torch}"
            print(f"  deploy {' '.join(arguments):<10} {words}")
            if torch:
                sys.exit("error: torch was imported")


if __name__ == "__main__":
    main()
