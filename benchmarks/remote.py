"""What the way to a host costs, beside raw ssh and rsync in the same run, over a link with a delay.

    python -m benchmarks.remote [--rtt-ms 80] [--megabytes 200] [--steps 40]

A real sshd on loopback behind a proxy that hands each byte on half a round trip later (a kernel with `tc netem` is not
needed); the real command, the real worker, a stand-in that trains. The proxy's own rate bounds both sides of a pull.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rollouts.manifest import write_manifest
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import Transport
from rollouts.remote.run.checkpoints import pull_checkpoint
from rollouts.remote.run.sync_code import CodePlace, sync_code
from rollouts.run_dir import RunDir, read_jsonl
from tests.faults.lab import Setting, World, make_shared, world
from tests.remote.hosts import wait_for, write_config

FILES, FILE_BYTES = 500, 4000
REPEATS = 3
CHECKPOINT = "checkpoints/sft/step_000009"


def timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def run_command(argv: Sequence[str]) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def line_of(name: str, ours: float, other: str, theirs: float, goal: str) -> str:
    return f"{name:<44} {ours:8.3f} s   {other:<18} {theirs:8.3f} s   ratio {ours / theirs:5.2f}   wanted {goal}"


class Bench:
    """One laptop, one host, the link between them, and plain ssh and rsync over the same link."""

    def __init__(self, made: World) -> None:
        self.made = made
        os.environ["HOME"] = str(made.laptop.home)  # whose keys this process's own connections use
        laptop, port = made.laptop, made.link.port
        options = [
            "-F",
            "/dev/null",
            "-i",
            str(laptop.key),
            "-o",
            f"UserKnownHostsFile={laptop.known_hosts}",
        ]
        self.ssh = ["ssh", *options, "-o", "BatchMode=yes", "-p", str(port)]
        self.rsync = ["rsync", "-e", shlex.join(self.ssh)]
        self.there = made.host.directory / "plain"
        self.there.mkdir()

    def redeploy(self) -> str:
        """A session that runs: `attach` until it says where the run is, beside ssh's login and a command."""
        seconds = []
        for _ in range(REPEATS):
            began = time.monotonic()
            process = self.made.laptop.start("attach", self.made.run_id)
            assert process.stdout is not None
            while (line := process.stdout.readline()) and not line.startswith(
                ("attach:", "stage=")
            ):
                pass
            seconds.append(time.monotonic() - began)
            process.kill()
            process.communicate()
        raw = [timed(lambda: run_command([*self.ssh, "127.0.0.1", "true"])) for _ in range(REPEATS)]
        return line_of("attach to a running session", min(seconds), "ssh true", min(raw), "<= 5 s")

    def delay_of_lines(self, steps: int) -> str:
        """From the trainer's own time in a row to that row's arrival on the laptop's screen."""
        process = self.made.laptop.start("attach", self.made.run_id, "--json", "--no-checkpoints")
        assert process.stdout is not None
        late: list[float] = []
        first_at = 0.0  # rows of before were there already
        for line in process.stdout:
            row = json.loads(line)
            if row.get("type") == "metrics":
                first_at = first_at or time.time()
                late += [time.time() - row["time"]] if row["time"] > first_at else []
            if len(late) == steps:
                break
        process.kill()
        process.communicate()
        median, rtt_s = statistics.median(late), 2 * self.made.link.delay_s
        return line_of(
            "a line, trainer to screen (median)",
            median,
            "round trip",
            rtt_s,
            f"<= {rtt_s + 0.15:.2f} s",
        )

    def sync(self, transport: Transport) -> str:
        """One file of 500 changed since the last run, beside rsync -a of the same."""
        tree = self.made.laptop.home / "tree"
        tree.mkdir()
        for number in range(FILES):
            (tree / f"file_{number:03d}.py").write_bytes(os.urandom(FILE_BYTES))
        names = tuple(sorted(file.name for file in tree.iterdir()))
        ours, plain = [], []
        for number in range(1 + REPEATS):
            (tree / names[number]).write_text(f"changed {number}\n")
            home = str(self.made.host.home)
            place = CodePlace(
                home=home, run_path=f"{home}/runs/bench{number}", project="bench", launch_id="b"
            )
            whole = [*self.rsync, "-a", f"{tree}/", f"127.0.0.1:{self.there}/tree/"]
            ours.append(timed(partial(sync_code, transport, place, root=tree, files=names)))
            plain.append(timed(partial(run_command, whole)))
        return line_of(
            "sync, 1 of 500 files changed", min(ours[1:]), "rsync -a", min(plain[1:]), "<= 1.3 x"
        )

    def pull(self, transport: Transport, megabytes: int) -> str:
        """One checkpoint, verified, beside rsync -a of the same file."""
        run_path = self.made.host.home / "runs" / "pulled"
        checkpoint = run_path / CHECKPOINT
        checkpoint.mkdir(parents=True)
        with (checkpoint / "model.safetensors").open("wb") as stream:
            for _ in range(megabytes):
                stream.write(os.urandom(10**6))
        write_manifest(checkpoint)
        into = self.made.laptop.home / "plain"
        plain = timed(
            lambda: run_command([*self.rsync, "-a", f"127.0.0.1:{checkpoint}/", f"{into}/"])
        )
        mirror = RunDir(self.made.laptop.home / "mirror")
        ours = timed(lambda: pull_checkpoint(transport, str(run_path), mirror, CHECKPOINT))
        return line_of(
            f"pull of {megabytes} MB, verified",
            ours,
            "rsync -a",
            plain,
            "rate >= 0.9 x: ratio <= 1.11",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rtt-ms", type=float, default=80.0, help="added to every round trip")
    parser.add_argument(
        "--megabytes", type=int, default=200, help="of the checkpoint that is pulled"
    )
    parser.add_argument("--steps", type=int, default=40, help="lines whose way is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="remote-") as place:
        shared = Path(place) / "shared"
        shared.mkdir()
        make_shared(shared)
        with world(
            shared, Path(place) / "world", "bench", Setting(arguments.rtt_ms / 2000)
        ) as made:
            env = {"STAND_IN_STEP_S": "0.25", "STAND_IN_STEPS": "100000"}
            config = str(write_config(made.laptop.project, output__mode="sft", env=env))
            done = made.laptop.deploy(
                config, "--remote", made.target, "--run-id", made.run_id, "--detach"
            )
            assert done.returncode == 0, done.stderr
            wait_for(lambda: read_jsonl(made.there.metrics), "the first step")
            bench = Bench(made)
            transport = open_transport(made.target, accept_new_host_key=False)
            print(
                f"+{arguments.rtt_ms:g} ms round trip; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
            )
            print(bench.redeploy(), flush=True)
            print(bench.delay_of_lines(arguments.steps), flush=True)
            made.laptop.deploy("stop", made.run_id, "--now")
            print(bench.sync(transport), flush=True)
            print(bench.pull(transport, arguments.megabytes), flush=True)
            transport.close()


if __name__ == "__main__":
    main()
