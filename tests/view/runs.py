"""Run directories for tests of what is shown: written as a trainer writes them, with numbers that are known."""

import json
import math
import random
from pathlib import Path
from typing import Any

from rollouts.run_dir import RunDir, append_jsonl
from tests.example_config import example_config

START = 1_790_000_000.0
STEP_S = 2.0


def write_run(
    path: Path, *, steps: int = 40, seed: int = 0, rows: int = 60, gain: float = 0.5
) -> RunDir:
    """Write a run of sft, then rl, whose reward rises by `gain`. `seed` moves every number a little."""
    run, draw = RunDir(path), random.Random(seed)
    path.mkdir(parents=True)
    config = example_config().to_json()
    config["rl"]["sampling"]["seed"] = seed
    run.config.write_text(json.dumps(config))
    run.code.mkdir()
    (run.code / "commit.txt").write_text("0123abcd\n")
    (run.code / "dirty.diff").write_text("")
    run.environment("trainer").write_text("torch==2.13.0\ntransformers==5.1.0\n")
    append_jsonl(run.metrics, *(sft_row(step, draw) for step in range(1, steps + 1)))
    append_jsonl(run.metrics, *(rl_row(step, steps, gain, draw) for step in range(1, steps + 1)))
    write_answers(run, steps, rows, draw)
    write_rollouts(run, steps, draw)
    write_events(run, steps)
    return run


def sft_row(step: int, draw: random.Random) -> dict[str, Any]:
    loss = 2.0 * math.exp(-step / 10) + 0.05 * draw.random()
    numbers = {
        "loss": loss,
        "grad_norm": 1 + draw.random() / 10,
        "lr": 1e-3,
        "tokens_per_s": 1000.0 + draw.random(),
    }
    times = {"step_s": 0.5, "train_s": 0.4, "data_s": 0.05}
    return {"stage": "sft", "step": step, "time": START + step, **numbers, **times}


def rl_row(step: int, steps: int, gain: float, draw: random.Random) -> dict[str, Any]:
    numbers = {
        "loss": -0.05 * draw.random(),
        "reward_mean": 0.2 + gain * step / steps + 0.02 * draw.random(),
        "reward_std": 0.3,
        "entropy": 1.5 - 0.2 * step / steps,
        "kl_sampler": 1e-4 * draw.random(),
        "grad_norm": 1 + draw.random() / 10,
        "truncated_frac": 0.05,
        "groups_zero_std_frac": 0.2,
        "response_length_mean": 20.0 + draw.random(),
        "tokens_per_s": 900.0 + draw.random(),
        "step_s": 2.0,
        "generate_s": 1.2,
        "train_s": 0.5,
        "sync_s": 0.2,
    }
    return {"stage": "rl", "step": step, "time": START + 100 + STEP_S * step, **numbers}


def write_answers(run: RunDir, steps: int, rows: int, draw: random.Random) -> None:
    for stage, step, share in (
        ("base", 0, 0.1),
        ("sft", steps, 0.4),
        ("rl", 0, 0.4),
        ("rl", steps // 2, 0.6),
        ("rl", steps, 0.8),
    ):
        right = [draw.random() < share for _ in range(rows)]
        append_jsonl(
            run.eval_samples, *(answer_row(stage, step, row, right[row]) for row in range(rows))
        )
        append_jsonl(run.eval, eval_row(stage, step, "exact_match", sum(right) / rows))
    append_jsonl(
        run.eval,
        *(eval_row("sft", step, "validation_loss", 2 - step / steps) for step in range(1, steps)),
    )


def answer_row(stage: str, step: int, row: int, correct: bool) -> dict[str, Any]:
    asked = {
        "row": row,
        "prompt_id": f"p{row}",
        "prompt": {"question": f"Q {row}?"},
        "task": "t",
        "expected": f"A{row}",
    }
    return {
        "stage": stage,
        "step": step,
        **asked,
        "answer": f"A{row}" if correct else "no",
        "correct": correct,
    }


def eval_row(stage: str, step: int, metric: str, value: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "split": "test",
        "task": "all",
        "metric": metric,
        "value": value,
    }


def write_rollouts(run: RunDir, steps: int, draw: random.Random, *, group_size: int = 4) -> None:
    for step in range(1, steps + 1):
        append_jsonl(
            run.rollouts,
            *(rollout_row(step, place, draw, group_size) for place in range(2 * group_size)),
        )


def rollout_row(step: int, place: int, draw: random.Random, group_size: int) -> dict[str, Any]:
    length, group = draw.randint(3, 9), place // group_size
    return {
        "step": step,
        "time": START + 100 + STEP_S * step,
        "group": group,
        "prompt": {"question": f"Q {group}?"},
        "prompt_id": f"p{group}",
        "response": f"answer {step}.{place}",
        "tokens": list(range(4 + length)),
        "response_length": length,
        "loss_mask": [1.0] * (4 + length),
        "rollout_log_probs": [-0.5] * length,
        "temperature": 1.0,
        "reward": draw.random(),
        "advantage": draw.uniform(-1, 1),
        "step_samples": 2 * group_size,
        "weight_version": step - 1,
        "finish_reason": "stop",
        "metadata": {},
    }


def write_events(run: RunDir, steps: int) -> None:
    def event(after: float, kind: str, **fields: Any) -> dict[str, Any]:
        return {"time": START + after, "kind": kind, **fields}

    append_jsonl(
        run.events,
        event(-5, "run_started", mode="sft+rl"),
        event(-2, "stage_started", stage="sft"),
        event(0, "training_started", stage="sft", step=0, steps_total=steps),
        event(steps, "stage_ended", stage="sft", seconds=float(steps)),
        event(95, "stage_started", stage="rl"),
        event(96, "engine_ready", window="engine-0", url="http://127.0.0.1:1/ready", seconds=1.0),
        event(100, "training_started", stage="rl", step=0, steps_total=steps),
        event(
            110,
            "engine_restarted",
            stage="rl",
            window="engine-0",
            reason="it died",
            restarts_left=2,
        ),
        event(
            100 + STEP_S * steps,
            "checkpoint",
            stage="rl",
            step=steps,
            path=f"checkpoints/rl/step_{steps:06d}",
        ),
        event(101 + STEP_S * steps, "stage_ended", stage="rl", seconds=90.0),
        event(
            102 + STEP_S * steps, "run_ended", state="done", exit_code=0, message="all stages done"
        ),
    )
