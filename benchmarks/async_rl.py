"""The CPU demo's RL stage, generating ahead of training beside taking turns: steps/s and what was learned.

    python -m benchmarks.async_rl [--steps 300] [--repeats 3] [--lags 0 1 2]

`configs/00_cpu_sft_rl.py` as it is, but for `rl.loss.importance` on every side ("token_truncate"; on policy its
weight is exactly 1) and evaluations before and after alone. All start from one SFT checkpoint; each is the real
trainer and the real engine, in processes of their own with one thread, the trainer pinned to one core and the engine
to another. A lag above 1 has in-flight updates. The sides take turns within each repeat, so that a busy machine slows
all; a ratio is the median over repeats. Steps/s are of the time in steps (`step_s`) without the first `WARM_UP`; CPU
time is of the same steps, of either process: where they take turns a step lasts the sum, where they do not at least
the larger.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from base_config import AheadConfig, Config, ImportanceConfig, load_config
from rollouts.run_dir import RunDir, iter_jsonl

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10  # steps
LAST = 30  # steps whose mean reward is shown
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Side:
    """A whole RL stage, measured."""

    steps_per_s: float
    parts_ms: Mapping[str, float]  # medians of the step's parts
    cpu_ms: Mapping[str, float]  # a step, of trainer and engine
    reward: float  # mean over the last steps
    exact_match: float  # of the held-out answers, after
    lag: float  # mean, in steps


def demo(steps: int, lag: int, source: str) -> Config:
    """The demo's RL stage alone, from a checkpoint."""
    config = load_config(ROOT / "configs" / "00_cpu_sft_rl.py")
    assert config.rl is not None
    prompts = config.rl.examples_per_step * (steps // config.rl.num_epochs)
    loss = replace(config.rl.loss, importance=ImportanceConfig(kind="token_truncate", cap=2.0))
    ahead = AheadConfig(policy_lag_steps_max=lag, in_flight_updates=lag > 1) if lag else None
    rl = replace(config.rl, loss=loss, ahead=ahead, eval_every=-1)
    mixture = [replace(spec, max_samples=prompts) for spec in config.data.rl_mixture]
    output = replace(config.output, mode="rl", source_checkpoint=source)
    config = replace(config, rl=rl, data=replace(config.data, rl_mixture=mixture), output=output)
    assert not config.problems(), config.problems()
    return config


@contextlib.contextmanager
def pinned(core: int, module: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process of one thread on one core, ended afterwards."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def train(
    config: Config,
    directory: Path,
    core: int,
    stage: str,
    *arguments: str,
    engine_pid: int | None = None,
) -> tuple[RunDir, dict[str, float]]:
    """One stage by the real trainer; and with an engine, the CPU milliseconds a step of both, without the warm-up."""
    directory.mkdir(parents=True)
    run = RunDir(directory)
    config.save(run.config)
    seen: list[tuple[int, float, float]] = []  # steps logged, CPU seconds of trainer and engine
    with pinned(
        core, "rollouts.worker.trainer", ["--run-dir", str(directory), "--stage", stage, *arguments]
    ) as trainer:
        while trainer.poll() is None:
            time.sleep(0.02)
            steps = run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0
            if engine_pid is not None and steps >= WARM_UP and (not seen or steps > seen[-1][0]):
                seen.append((steps, cpu_s(trainer.pid), cpu_s(engine_pid)))
        if trainer.returncode != 0:
            raise SystemExit(f"the {stage} trainer ended with {trainer.returncode}")
    if not seen:
        return run, {}
    steps, trainer_s, engine_s = (
        after - before for after, before in zip(seen[-1], seen[0], strict=True)
    )
    return run, {"trainer": 1000 * trainer_s / steps, "engine": 1000 * engine_s / steps}


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def engine(model: str, rows: int, core: int) -> Iterator[tuple[str, int]]:
    """An embedded engine, once it is ready; its URL and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--model-path", model, "--port", str(port), "--max-running-requests", str(rows)]
    with pinned(core, "rollouts.engines.embedded", arguments) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            with (
                contextlib.suppress(urllib.error.URLError),
                urllib.request.urlopen(f"{url}/health", timeout=5),
            ):
                yield url, process.pid
                return
            time.sleep(0.1)
        raise SystemExit(f"the engine is not ready; it ended with {process.poll()}")


def run_side(steps: int, lag: int, source: str, directory: Path, cores: Sequence[int]) -> Side:
    config = demo(steps, lag, source)
    assert config.engine is not None
    with engine(source, config.engine.max_running_requests, cores[1]) as (url, pid):
        run, cpu_ms = train(config, directory, cores[0], "rl", "--engine-url", url, engine_pid=pid)
    rows: list[dict[str, Any]] = list(iter_jsonl(run.metrics))
    assert len(rows) == steps, f"{len(rows)} steps of {steps} were logged"
    measured, names = rows[WARM_UP:], ("generate_s", "train_s", "sync_s", "step_s")
    final = [
        row
        for row in iter_jsonl(run.eval)
        if row["step"] == steps and row["metric"] == "exact_match"
    ]
    return Side(
        steps_per_s=len(measured) / sum(row["step_s"] for row in measured),
        cpu_ms=cpu_ms,
        parts_ms={name: 1000 * statistics.median(row[name] for row in measured) for name in names},
        reward=statistics.fmean(row["reward_mean"] for row in rows[-LAST:]),
        exact_match=statistics.fmean(row["value"] for row in final),
        lag=statistics.fmean(row["lag_mean"] for row in rows),
    )


def report(sides: Mapping[int, Sequence[Side]]) -> None:
    base = min(sides)
    for lag, found in sides.items():
        ratios = [
            side.steps_per_s / other.steps_per_s
            for side, other in zip(found, sides[base], strict=True)
        ]
        parts, cpu = (
            ", ".join(
                f"{name} {statistics.median(each[name] for each in table):.1f}" for name in table[0]
            )
            for table in ([side.parts_ms for side in found], [side.cpu_ms for side in found])
        )
        print(
            f"lag {lag}: {statistics.median(side.steps_per_s for side in found):6.2f} steps/s, "
            f"ratio {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}), "
            f"reward of the last {LAST} steps {statistics.fmean(side.reward for side in found):.3f}, "
            f"exact match after {statistics.fmean(side.exact_match for side in found):.3f}, "
            f"mean lag {found[0].lag:.2f}\n        ms a step: {parts}; of CPU: {cpu}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2 or args.steps <= max(WARM_UP, LAST) or args.steps % 2:
        parser.error(
            f"needs two cores, has {len(cores)}; and an even number of steps over {LAST}, got {args.steps}"
        )
    sides: dict[int, list[Side]] = {lag: [] for lag in args.lags}
    with tempfile.TemporaryDirectory() as work:
        shipped = load_config(ROOT / "configs" / "00_cpu_sft_rl.py")
        sft_alone = replace(shipped, output=replace(shipped.output, mode="sft"))
        sft, _ = train(sft_alone, Path(work) / "sft", cores[0], "sft")
        source = str(sft.latest_checkpoint("sft").resolve())
        for repeat in range(args.repeats):
            for lag in args.lags:
                side = run_side(args.steps, lag, source, Path(work) / f"lag_{lag}_{repeat}", cores)
                sides[lag].append(side)
                print(json.dumps({"repeat": repeat, "lag": lag, **vars(side)}), flush=True)
    report(sides)


if __name__ == "__main__":
    main()
