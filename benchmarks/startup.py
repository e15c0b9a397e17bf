"""Warm start: from `deploy` to the trainer's first metric, here and over loopback SSH, beside raw ssh + rsync + python.

    .venv/bin/python -m benchmarks.startup [--repeats 5]

The demo's config, SFT alone, environment built beforehand (the first, unmeasured run of each target does that). "own"
is what rollouts itself takes: until the supervisor's process starts on the host, and until the trainer's does. The
rest, to the first metric, is importing torch and transformers, loading data and evaluating the base model. Needs what
the end-to-end tests need (sshd). Prints medians in seconds, and the ratio of "own" to the raw commands.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from base_config import Config, load_config
from rollouts.run_dir import RunDir, iter_jsonl
from tests.example_config import replace_at
from tests.remote.hosts import Host, Laptop, host, kill_tmux, make_laptop

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "rollouts-tests" / "envs"
TIMEOUT_S = 1800.0


def benchmark_config(directory: Path) -> Config:
    config = load_config(ROOT / "configs" / "00_cpu_sft_rl.py")
    for path, value in {
        "output.mode": "sft",
        "output.experiment_name": "startup",
        "output.save_dir": str(directory / "results"),
        "sft.num_iterations": 2,
        "sft.log_every": 1,
    }.items():
        config = replace_at(config, path, value)
    return config


@contextlib.contextmanager
def machines(directory: Path) -> Iterator[tuple[Laptop, Host]]:
    """A laptop, and a host on loopback that it may log in to; both have the environments built earlier."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"
    tmux_dir = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))
    laptop = make_laptop(directory / "laptop", ROOT, tmux_dir)
    laptop.environment["PATH"] = path
    with host(directory / "host", laptop.key, path=Path(path)) as remote:
        for home in (laptop.rollouts_home, remote.home):
            home.mkdir(parents=True)
            (home / "envs").symlink_to(CACHE)
        laptop.know(remote)
        yield laptop, remote
    kill_tmux(tmux_dir)


def measure(
    laptop: Laptop, config: Path, run_id: str, home: Path, *remote: str
) -> dict[str, float]:
    """Seconds from the start of `deploy` to each moment, by the clock that both sides share."""
    started = time.time()
    done = laptop.deploy(str(config), "--run-id", run_id, *remote, timeout_s=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"deploy ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    run = RunDir(home / "runs" / run_id)

    def start_of(name: str) -> float:
        return json.loads(run.process(name).read_text())["started_at"] - started

    return {
        "own: supervisor starts": start_of("supervisor"),
        "own: trainer starts": start_of("trainer"),
        "first metric": next(iter_jsonl(run.metrics))["time"] - started,
    }


def raw_commands(laptop: Laptop, target: Host | None, directory: Path) -> float:
    """Seconds that the same work takes by hand: rsync git's files to a fresh directory, then start a Python there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    there = directory / f"raw{time.monotonic_ns()}"
    options = (
        "-i",
        str(laptop.key),
        "-o",
        f"UserKnownHostsFile={laptop.known_hosts}",
        "-o",
        "BatchMode=yes",
    )
    ssh = ["ssh", *options, "-p", str(target.port), "127.0.0.1"] if target else []
    shell = ["-e", shlex.join(ssh[:-1])] if target else []
    to = f"127.0.0.1:{there}/" if target else f"{there}/"
    started = time.monotonic()
    subprocess.run(
        ["rsync", "-a", "--from0", "--files-from=-", *shell, f"{ROOT}/", to],
        input=listed.stdout,
        check=True,
    )
    subprocess.run([*ssh, "python3", "-c", "pass"], check=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name, machines(Path(name)) as (laptop, remote):
        config = Path(name) / "startup.json"
        benchmark_config(Path(name)).save(config)
        targets = {
            "local": (laptop.rollouts_home, (), None),
            "loopback ssh": (remote.home, ("--remote", remote.target), remote),
        }
        for label, (home, arguments, target) in targets.items():
            short = label.split()[0]
            measure(laptop, config, f"{short}-warmup", home, *arguments)
            rows = [
                measure(laptop, config, f"{short}-{n}", home, *arguments) for n in range(repeats)
            ]
            raw = statistics.median(
                raw_commands(laptop, target, Path(name)) for _ in range(repeats)
            )
            medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            print(f"{label}: medians of {repeats}, seconds")
            for key, value in medians.items():
                print(f"  {key:24} {value:6.2f}")
            own = medians["own: supervisor starts"]
            print(f"  {'raw rsync + python':24} {raw:6.2f}   own / raw = {own / raw:.1f}")


if __name__ == "__main__":
    main()
