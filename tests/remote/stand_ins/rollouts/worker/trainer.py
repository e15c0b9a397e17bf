"""Stands in for the trainer: writes what a trainer writes, in a fraction of a second.

STAND_IN_STEPS steps of STAND_IN_STEP_S seconds; STAND_IN_FAIL=stage exits 7 there after 60 lines; STAND_IN_WAIT=file
goes on with its second step only once that file exists, with STAND_IN_WAIT_IN=stage only there;
STAND_IN_PRINT_HASH_OF=NAME prints that variable's SHA-256; STAND_IN_CHECKPOINT_BYTES is the size of each checkpoint's
weights. STAND_IN_HOLD=checkpoint stays in the first one until a stop is asked for, STAND_IN_HOLD=evaluation in the
evaluation after the steps.
On several hosts the ranks beside the first only wait and print; STAND_IN_FAIL_RANK: the one that STAND_IN_FAIL is for.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

from rollouts.manifest import write_manifest
from rollouts.run_dir import RunDir, append_event, append_jsonl, restart_from

STEPS = int(os.environ.get("STAND_IN_STEPS", "3"))
STEP_S = float(os.environ.get("STAND_IN_STEP_S", "0.01"))
CHECKPOINT_BYTES = int(os.environ.get("STAND_IN_CHECKPOINT_BYTES", "100000"))


def checkpoint(run: RunDir, stage: str, step: int) -> None:
    directory = run.checkpoints / stage / f"step_{step:06d}"
    temporary = directory.with_name(f".{directory.name}.tmp")
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text("{}")
    (temporary / "model.safetensors").write_bytes(os.urandom(CHECKPOINT_BYTES))
    hold(run, "checkpoint")
    write_manifest(temporary)
    temporary.rename(directory)
    link = directory.parent / "latest"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    append_event(
        run, "checkpoint", stage=stage, step=step, path=directory.relative_to(run.path).as_posix()
    )


def hold(run: RunDir, place: str) -> None:
    while os.environ.get("STAND_IN_HOLD") == place and not run.stop_asked.exists():
        time.sleep(0.02)


def follow(run: RunDir, stage: str) -> None:
    """Take part in a stage as a rank that writes nothing."""
    print(f"stage={stage} rank={os.environ['RANK']}", flush=True)
    wait, asked = os.environ.get("STAND_IN_WAIT"), run.first.stop_asked
    while wait and not Path(wait).exists() and not asked.exists():
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--stage")
    rank = os.environ.get("RANK", "0")
    parser.add_argument("--receiver-url")
    parser.add_argument("--engine-url", required="rl" in sys.argv and rank == "0")
    arguments = parser.parse_args()
    run, stage = RunDir(arguments.run_dir), arguments.stage
    if (
        os.environ.get("STAND_IN_FAIL") == stage
        and os.environ.get("STAND_IN_FAIL_RANK", rank) == rank
    ):
        for line in range(60):
            print(f"line {line} of a failing trainer", flush=True)
        sys.exit(7)
    if secret := os.environ.get("STAND_IN_PRINT_HASH_OF"):
        print(hashlib.sha256(os.environ[secret].encode()).hexdigest(), flush=True)
    if rank != "0":
        return follow(run, stage)
    run.heeds_stop.touch()
    origin = restart_from(run, stage)  # a stage that restarts goes on from its checkpoint
    first = int(origin[-6:]) if origin else 0
    append_event(run, "training_started", stage=stage, step=first, steps_total=STEPS)
    if stage == "sft" and first == 0:
        append_jsonl(
            run.eval,
            {"stage": "base", "step": 0, "split": "test", "metric": "exact_match", "value": 0.25},
        )
    for step in range(first + 1, STEPS + 1):
        waits = stage in os.environ.get("STAND_IN_WAIT_IN", "sft rl").split()
        wait = os.environ.get("STAND_IN_WAIT") if waits else None
        while wait and step == 2 and not Path(wait).exists() and not run.stop_asked.exists():
            time.sleep(0.02)
        time.sleep(STEP_S)
        row = {"stage": stage, "step": step, "time": time.time(), "loss": 1.0 / step}
        append_jsonl(run.metrics, row if stage == "sft" else {**row, "reward_mean": 0.1 * step})
        print(f"stage={stage} step={step}", flush=True)
        stopped = run.stop_asked.exists()
        if step in (1, STEPS) or stopped:
            checkpoint(run, stage, step)
        if stopped:
            break
    run.heeds_stop.unlink()
    hold(run, "evaluation")
    append_jsonl(
        run.eval,
        {"stage": stage, "step": STEPS, "split": "test", "metric": "exact_match", "value": 0.75},
    )


main()
