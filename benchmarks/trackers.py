"""What a tracker beside a run costs a step: a step's time alone, beside TensorBoard, and beside one that blocks.

    .venv/bin/python -m benchmarks.trackers [--steps 20] [--rounds 60]

A step computes for a while and appends a row to metrics.jsonl, which is all that a trainer does for a tracker. The
kinds take turns of a few steps; the processes of the others are held meanwhile. "alone again" is the same as "alone":
its ratio is the noise. Prints medians by the clock and in the processor's seconds, which other programs of the machine
change less, and the ratios to the step alone with their 95 % intervals (bootstrap over the turns).
"""

import argparse
import hashlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rollouts.run_dir import RunDir, append_jsonl

ROOT = Path(__file__).resolve().parent.parent
WORK = bytes(4 << 20)
ROUNDS_A_STEP = 8
# the tracker's package, which never comes back
BLOCKING = "import time\ndef __getattr__(name):\n    time.sleep(3600)\n"


def steps(run: RunDir, first: int, count: int) -> list[tuple[float, float]]:
    """Take steps, and return their seconds: by the clock, and of the processor."""
    found = []
    for step in range(first, first + count):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for _ in range(ROUNDS_A_STEP):
            hashlib.sha256(WORK).digest()
        append_jsonl(run.metrics, {"stage": "rl", "step": step, "time": time.time(), "loss": 0.5})
        found.append((time.perf_counter() - begin, time.process_time() - begin_cpu))
    return found


def feed(run: RunDir, packages: Path | None) -> "subprocess.Popen[bytes]":
    """Start the process that feeds TensorBoard; `packages` has another tensorboardX."""
    argv = [sys.executable, "-m", "rollouts.view.feed", str(run.path), "tensorboard", "p"]
    path = f"{packages}:{ROOT}" if packages is not None else str(ROOT)
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [*argv, str(run.path / "files")], env={"PYTHONPATH": path}, stdout=quiet, stderr=quiet
    )


KINDS = {"alone": False, "alone again": False, "beside TensorBoard": True, "beside a block": True}
Turns = dict[str, list[list[tuple[float, float]]]]  # by kind: each turn's steps


def take_turns(directory: Path, options: argparse.Namespace) -> Turns:
    packages = directory / "packages"
    packages.mkdir()
    (packages / "tensorboardX.py").write_text(BLOCKING)
    runs, feeds = {}, {}
    for kind, is_fed in KINDS.items():
        runs[kind] = run = RunDir(directory / kind.replace(" ", "-"))
        run.path.mkdir()
        run.config.write_text("{}")
        append_jsonl(run.metrics, {"stage": "rl", "step": 0, "time": 0.0, "loss": 1.0})
        if is_fed:
            feeds[kind] = feed(run, packages if kind == "beside a block" else None)
            while not run.tracker("tensorboard").exists():
                time.sleep(0.05)
            time.sleep(1)
            feeds[kind].send_signal(signal.SIGSTOP)
    found: Turns = {kind: [] for kind in KINDS}
    try:
        for number in range(options.rounds):
            order = list(KINDS)
            random.Random(number).shuffle(order)
            for kind in order:
                if kind in feeds:
                    feeds[kind].send_signal(signal.SIGCONT)
                found[kind].append(steps(runs[kind], number * options.steps + 1, options.steps))
                if kind in feeds:
                    feeds[kind].send_signal(signal.SIGSTOP)
    finally:
        for process in feeds.values():
            process.kill()
            process.wait()
    return found


def interval(turns: Turns, kind: str, at: int) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of the ratio of medians, over resampled rounds."""
    draw, ratios = random.Random(0), []
    rounds = range(len(turns[kind]))
    for _ in range(500):
        chosen = draw.choices(rounds, k=len(rounds))
        found, alone = (
            statistics.median(step[at] for turn in chosen for step in turns[one][turn])
            for one in (kind, "alone")
        )
        ratios.append(found / alone)
    ratios.sort()
    return ratios[12], ratios[487]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        turns = take_turns(Path(directory), options)
    for at, what in enumerate(("clock", "processor")):
        medians = {
            kind: statistics.median(step[at] for turn in found for step in turn)
            for kind, found in turns.items()
        }
        print(f"by {what}: a step alone {1000 * medians['alone']:.3f} ms")
        for kind in list(KINDS)[1:]:
            low, high = interval(turns, kind, at)
            ratio = medians[kind] / medians["alone"]
            print(
                f"  {kind}: {100 * (ratio - 1):+.2f} % ({100 * (low - 1):+.2f} to {100 * (high - 1):+.2f})"
            )


if __name__ == "__main__":
    main()
