"""Record what real runs of a tree compute, and compare two records bit by bit.

    scripts/same_bits record OUT.json [JOB ...]     in each of two trees: the one before a change, and the one after
    scripts/same_bits compare BEFORE.json AFTER.json

Each job is a whole `deploy` on this machine's CPU, one thread a process. A record has every logged number but times
and memory, every sample's tokens, log-probs and reward, and the SHA-256 of every file of the last checkpoints.
Minutes a job. Exit 1 at the first difference of a job, which is printed.
"""

import argparse
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".same_bits"  # config files of the jobs, inside the repository as deploy wants them
TIMES = ("time", "tokens_per_s", "peak_memory_gib", "mfu")  # and all that ends with _s

BASE = """from pathlib import Path

from base_config import AheadConfig, ImportanceConfig, LoraConfig, changed, load_config

config = changed(
    load_config(Path(__file__).parents[1] / "configs" / "{base}.py"),
    {{
        "output.save_dir": {folder!r},
        "output.experiment_name": "{name}",
        "host.threads_per_process": 1,
        "engine.sglang_port": {port},
        {changes}
    }},
)
"""
SHORT = '"sft.num_iterations": 50, "data.rl_mixture.0.max_samples": 1600, "rl.num_epochs": 1, "rl.eval_every": 25,'
FEW = '"sft.num_iterations": 20, "data.rl_mixture.0.max_samples": 640, "rl.num_epochs": 1, "rl.eval_every": 10,'
NO_EMBEDDING_LR = "".join(
    f'"{stage}.{part}embedding_lr": 0.0,' for stage in ("sft", "rl") for part in ("", "un")
)
LORA = 'LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", init_seed=0)'
IMPORTANCE = 'ImportanceConfig(kind="token_truncate", cap=2.0)'
JOBS = {  # name: (shipped config, changes)
    "plain": ("00_cpu_sft_rl", SHORT),  # 50 steps of SFT, 50 of RL
    "agent": (
        "00_cpu_sft_rl_agent",
        '"sft.num_iterations": 50, "data.rl_mixture.0.max_samples": 800,',
    ),
    "lora": ("00_cpu_sft_rl", FEW + NO_EMBEDDING_LR + f'"model.lora": {LORA},'),
    "fsdp": (
        "00_cpu_sft_rl",
        FEW
        + '"target.gpu_ranks": [0, 1], "target.sharding": "full_shard","sft.batch_size": 64, "rl.batch_size": 128,',
    ),
    "lag": (
        "00_cpu_sft_rl",
        FEW
        + '"rl.ahead": AheadConfig(policy_lag_steps_max=1, in_flight_updates=False), "rl.loss.importance": IMPORTANCE,',
    ),
    "replay": ("00_cpu_sft_rl", SHORT + '"rl.sampling.source": {rollouts!r}, "engine": None,'),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    record_parser = verbs.add_parser("record")
    record_parser.add_argument("out", type=Path)
    record_parser.add_argument(
        "jobs", nargs="*", default=list(JOBS), help=f"of {', '.join(JOBS)}; default: all"
    )
    compare_parser = verbs.add_parser("compare")
    compare_parser.add_argument("before", type=Path)
    compare_parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "compare":
        return compare(
            json.loads(arguments.before.read_text()), json.loads(arguments.after.read_text())
        )
    unknown = sorted(set(arguments.jobs) - set(JOBS))
    if unknown:
        parser.error(f"{unknown[0]!r} is not a job: choose from {', '.join(JOBS)}")
    record(arguments.out, arguments.jobs)
    return 0


# --- record ---------------------------------------------------------------------------------------------------------


def record(out: Path, jobs: list[str]) -> None:
    """Run the jobs one after another and write what each computed; OUT grows by a job at a time."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    rollouts = str(out.resolve().with_suffix(".rollouts.jsonl"))  # of "plain", for "replay"
    for place, name in enumerate(jobs):
        base, changes = JOBS[name]
        changes = changes.replace("{rollouts!r}", repr(rollouts)).replace("IMPORTANCE", IMPORTANCE)
        run = deploy(
            name,
            BASE.format(
                base=base,
                folder=str(FOLDER / "runs"),
                name=f"same_bits_{name}",
                port=30480 + place,
                changes=changes,
            ),
        )
        if name == "plain":
            lines = [json.dumps(kept(line)) + "\n" for line in read(run / "rollouts.jsonl")]
            # without times: the replay's checkpoint has the file's digest
            Path(rollouts).write_text("".join(lines))
        found[name] = fingerprint(run)
        out.write_text(json.dumps(found, indent=1))
        print(f"{name}: {len(found[name]['metrics'])} lines of metrics recorded", flush=True)


def deploy(name: str, text: str) -> Path:
    """Run a config to its end and return its mirror."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    config = FOLDER / f"{name}.py"
    shutil.rmtree(FOLDER / "runs" / f"same_bits_{name}", ignore_errors=True)
    config.write_text(text)
    log = FOLDER / "runs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [str(ROOT / ".venv" / "bin" / "deploy"), str(config)]
    with log.open("w") as lines:
        ended = subprocess.run(
            command, cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        sys.exit(f"{name}: deploy ended with {ended.returncode}\n{log.read_text()[-3000:]}")
    (run,) = (path for path in (FOLDER / "runs" / f"same_bits_{name}").iterdir() if path.is_dir())
    return run


def fingerprint(run: Path) -> dict[str, Any]:
    """What a run computed: its logged numbers, samples and weights."""
    files = ("metrics", "eval", "rollouts", "eval_samples")
    lines = {name: [kept(line) for line in read(run / f"{name}.jsonl")] for name in files}
    return {"metrics": lines["metrics"], "eval": lines["eval"]} | {
        "samples": {
            name: [digest(json.dumps(line, sort_keys=True)) for line in lines[name]]
            for name in files[2:]
        },
        "checkpoints": {
            str(path.relative_to(run / "checkpoints")): of_file(path)
            for path in sorted((run / "checkpoints").rglob("*"))
            if path.is_file()
            and path.suffix in (".safetensors", ".distcp", ".pt")
            and not any(part.is_symlink() for part in path.parents)
        },
    }


def of_file(path: Path) -> str:
    """Return the digest of a file of a checkpoint; of the training state less what the trainer does not seed."""
    if path.name != "training_state.pt":
        return digest(path.read_bytes())
    import torch

    state = torch.load(path, weights_only=False)
    # of Python's and numpy's own generators, which nothing of ours draws from
    for rng in state["rng"]:
        rng.pop("python"), rng.pop("numpy")
    parts: list[str] = []
    flatten(state, parts)
    return digest("\n".join(parts))


def flatten(value: Any, parts: list[str]) -> None:
    """Append every number, text and tensor of a nested state to `parts`, in order."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            parts.append(str(key))
            flatten(part, parts)
    elif hasattr(value, "numpy"):
        parts.append(digest(value.cpu().contiguous().view(-1).numpy().tobytes()))
    else:
        parts.append(repr(value))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kept(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what differs from one run to the next: times, memory, names of requests."""
    return {
        key: value
        for key, value in line.items()
        if key not in TIMES and not key.endswith("_s") and "_s_" not in key
    }


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[
        :16
    ]


# --- compare --------------------------------------------------------------------------------------------------------


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print the first difference of each job that both records have; return 1 if there is one."""
    different = 0
    for name in sorted(before.keys() & after.keys()):
        difference = first_difference(before[name], after[name], name)
        different += difference is not None
        print(difference or f"{name}: identical ({size(before[name])} values)")
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: in one record only")
    return 1 if different else 0


def first_difference(before: Any, after: Any, place: str) -> str | None:
    """Return where two values differ first, and how; None where they are equal to the last bit."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        missing = object()
        pairs = (
            (f"{place}.{key}", before.get(key, missing), after.get(key, missing)) for key in keys
        )
        return next((d for where, a, b in pairs if (d := first_difference(a, b, where))), None)
    if isinstance(before, list) and isinstance(after, list):
        pairs = (
            (f"{place}[{i}]", a, b) for i, (a, b) in enumerate(itertools.zip_longest(before, after))
        )
        return next((d for where, a, b in pairs if (d := first_difference(a, b, where))), None)
    return None if repr(before) == repr(after) else f"{place}: {before!r} before, {after!r} after"


def size(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(size, value.values() if isinstance(value, dict) else value))
    return 1


if __name__ == "__main__":
    sys.exit(main())
