"""Run a config once per seed and compare exact match before and after RL.

Called by scripts/learn_check and scripts/agent_learn_check, which say what gain is wanted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base_config import Config, changed, load_config  # noqa: E402  (the path above makes it importable)
from rollouts.run_dir import RunDir, read_jsonl  # noqa: E402


def with_seed(config: Config, seed: int, save_dir: str) -> Config:
    """Return the config with another seed of everything, and results in `save_dir`."""
    seeds = dict.fromkeys(("model.init_seed", "data.shuffle_seed", "rl.sampling.seed"), seed)
    return changed(config, {**seeds, "output.save_dir": save_dir})


def exact_match(run: RunDir) -> dict[str, float]:
    """Return the last exact match of each stage: {"base": ..., "sft": ..., "rl": ...}."""
    rows = [
        row
        for row in read_jsonl(run.eval)
        if (row["metric"], row["task"]) == ("exact_match", "all")
    ]
    return {row["stage"]: row["value"] for row in rows}


def stage_seconds(run: RunDir) -> float:
    """Return how long the stages took together, without the installation before them."""
    return sum(
        event["seconds"] for event in read_jsonl(run.events) if event["kind"] == "stage_ended"
    )


def run_seed(config: Config, seed: int, directory: Path) -> tuple[dict[str, float], float]:
    """Run one seed. Returns exact match by stage, and the seconds that the stages took."""
    file = directory / f"seed{seed}.json"
    seeded = with_seed(config, seed, str(directory / "runs"))
    seeded.save(file)
    run_id = f"{seeded.output.experiment_name}-seed{seed}-{int(time.time())}"
    subprocess.run(
        [sys.executable, "deploy.py", str(file), "--run-id", run_id], cwd=ROOT, check=True
    )
    run = RunDir(directory / "runs" / seeded.output.experiment_name / run_id)
    return exact_match(run), stage_seconds(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--config", default=str(ROOT / "configs" / "00_cpu_sft_rl.py"))
    parser.add_argument(
        "--gain-min",
        type=float,
        default=0.30,
        help="of exact match, from the end of SFT to that of RL",
    )
    parser.add_argument(
        "--minutes-max", type=float, default=float("inf"), help="for both stages together"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    with tempfile.TemporaryDirectory() as name:
        results = {seed: run_seed(config, seed, Path(name)) for seed in arguments.seeds}
    print(f"\n{'seed':>4}  {'base':>6}  {'sft':>6}  {'rl':>6}  {'gain':>6}  {'seconds':>7}")
    passed = True
    for seed, (values, seconds) in results.items():
        gain = values["rl"] - values["sft"]
        passed = passed and gain >= arguments.gain_min and seconds <= 60 * arguments.minutes_max
        print(
            f"{seed:>4}  {values['base']:6.3f}  {values['sft']:6.3f}  {values['rl']:6.3f}  {gain:+6.3f}  {seconds:7.0f}"
        )
    wanted = {"gain_min": arguments.gain_min}
    if arguments.minutes_max < float("inf"):
        wanted["minutes_max"] = arguments.minutes_max
    print(json.dumps({**wanted, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
