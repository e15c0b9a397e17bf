"""One GRPO step, ours through the HTTP engine beside TRL's GRPOTrainer: steps/s of both, their ratio, reward curves.

    python -m benchmarks.grpo [--new-tokens 8 128] [--threads 1 2] [--ranks 1 2] [--lag 0 1] [--steps 60] [--seeds 0]

16 prompts x 16 samples a step, a 2-layer, 64-wide Qwen2 in float32. All sides start from the same weights and see the
same prompts in the same order, the same reward, loss (token mean, no KL), advantages (group mean, group std), AdamW and
sampling. Ours is what a run does: a real embedded engine process over HTTP, `run_rl_training`, new weights in the
engine after every step. TRL generates in its own process with transformers (`use_vllm=False`).

Each stands once for each of `--threads` torch threads a process, and once for each of `--ranks` data-parallel processes
of one thread: ours has as many engines, too. TRL stands as it comes (8 rows a device, activation checkpointing), and
tuned, as fast as its options make it here: without checkpointing, all rows in one pass; of each its fastest counts. Our
engines and trainer work in turn, never at once, so no side computes on more cores than that; this is the ratio. With
`--lag N` one engine samples at most N steps ahead, beside the trainer: one thread each, two cores; printed beside it.

All live at once, and take turns of `--block` steps while the others wait; ratios are medians over rounds of turns, so
that a busy machine slows all. (An engine that works ahead has up to N batches ready when its turn begins.)
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.grpo_sides import PROMPTS, Job, free_port, process_cpu_s, run_ours, run_trl

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs" / "models" / "tiny_qwen2"


@dataclass
class Side:
    """A side's processes, and what it has reported so far."""

    name: str
    pipe: Connection
    pids: Sequence[int]
    wall_s: list[float] = field(default_factory=list)  # of each block
    cpu_s: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)

    @property
    def block_s(self) -> float:
        """The median turn; the first, in which everything warms up, left out."""
        return statistics.median(self.wall_s[1:])

    def take_turn(self) -> None:
        before_s = sum(map(process_cpu_s, self.pids))
        self.pipe.send(None)
        wall_s, rewards, times = self.pipe.recv()
        self.wall_s.append(wall_s)
        self.cpu_s.append(sum(map(process_cpu_s, self.pids)) - before_s)
        self.rewards += rewards
        self.times.append(times)


@contextlib.contextmanager
def running(
    name: str, target: Callable[[Connection | None, Job], None], job: Job
) -> Iterator[Side]:
    """A process of its own for each rank of `target`, ready for its first turn."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    port = free_port()
    processes = [
        spawn.Process(
            target=_run_rank,
            args=(target, there if rank == 0 else None, job, rank, port),
            name=name,
        )
        for rank in range(job.ranks)
    ]
    for process in processes:
        process.start()
    there.close()
    try:
        helpers = here.recv()
        yield Side(name, here, [*(process.pid for process in processes if process.pid), *helpers])
        here.send(None)
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run_rank(
    target: Callable[..., None], pipe: Connection | None, job: Job, rank: int, port: int
) -> None:
    if job.ranks > 1:  # as torchrun tells them
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": job.ranks,
            "LOCAL_WORLD_SIZE": job.ranks,
        }
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in (place | address).items()}
    target(pipe, job)


def race(job: Job, options: argparse.Namespace) -> tuple[list[Side], list[Side]]:
    """Ours and TRL's, each with each number of threads and ranks, run in turns."""
    settings = {f"{count} threads": {"threads": count} for count in options.threads}
    settings |= {f"{count} ranks": {"ranks": count} for count in options.ranks if count > 1}
    with contextlib.ExitStack() as stack:

        def start(name: str, target: Callable[[Connection, Job], None], **fields: Any) -> Side:
            return stack.enter_context(running(name, target, replace(job, **fields)))

        ours = [start(f"ours, {name}", run_ours, **fields) for name, fields in settings.items()]
        ours += [start(f"ours, lag {lag}", run_ours, lag=lag) for lag in options.lag if lag > 0]
        trl = [
            start(f"trl, {name}", run_trl, **fields, tuned=False)
            for name, fields in settings.items()
        ]
        trl += [start(f"trl tuned, {name}", run_trl, **fields) for name, fields in settings.items()]
        for _ in range(job.steps // job.block):
            for side in (*ours, *trl):
                side.take_turn()
    return ours, trl


def report(job: Job, ours: Sequence[Side], trl: Sequence[Side]) -> None:
    print(
        f"\n<= {job.new_tokens} new tokens, seed {job.seed}: {job.steps} steps in blocks of {job.block}"
    )
    for side in (*ours, *trl):
        speed = job.block / side.block_s
        cpu_ms = 1000 * statistics.median(side.cpu_s[1:]) / job.block
        curve = " ".join(
            f"{statistics.fmean(side.rewards[start : start + job.block]):.3f}"
            for start in range(0, job.steps, job.block)
        )
        rewards = f"reward {curve}, last third {last_third(side.rewards):.3f}"
        print(f"  {side.name:20} {speed:6.2f} steps/s {cpu_ms:7.1f} ms of CPU a step   {rewards}")
    tuned = [side for side in trl if "tuned" in side.name]
    as_it_comes = [side for side in trl if side not in tuned]
    peers = [min(kind, key=lambda side: side.block_s) for kind in (as_it_comes, tuned)]
    for side in ours:
        parts = {
            name: statistics.median(block[name] for block in side.times[1:])
            for name in side.times[1]
        }
        print(
            f"  {side.name}, ms a step: "
            + ", ".join(f"{name} {1000 * value:.1f}" for name, value in parts.items())
        )
        for peer in peers:
            ratios = [
                theirs / own for own, theirs in zip(side.wall_s[1:], peer.wall_s[1:], strict=True)
            ]
            cpu_ratios = [
                theirs / own for own, theirs in zip(side.cpu_s[1:], peer.cpu_s[1:], strict=True)
            ]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(
                f"    ÷ {peer.name}: {statistics.median(ratios):5.2f}   (median of {each})", end=""
            )
            print(f", CPU time of it ÷ ours {statistics.median(cpu_ratios):.2f}")


def last_third(rewards: Sequence[float]) -> float:
    return statistics.fmean(rewards[-(len(rewards) // 3) :])


def make_jobs(args: argparse.Namespace, work_dir: Path) -> Iterator[Job]:
    import random

    from rollouts.training.model_loading import load_model, load_tokenizer

    for seed in args.seeds:
        model_dir = work_dir / f"model-{seed}"
        load_model(str(MODEL), init="random", init_seed=seed).save_pretrained(model_dir)
        load_tokenizer(str(MODEL)).save_pretrained(model_dir)
        rng = random.Random(seed)
        words = tuple(
            "".join(rng.choices("abcdefghij", k=rng.randint(3, 6)))
            for _ in range(PROMPTS * args.steps)
        )
        for new_tokens in args.new_tokens:
            yield Job(
                *(str(model_dir), str(work_dir), words, new_tokens),
                *(args.steps, args.block, args.lr, 1, seed),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lag", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.steps % args.block or args.steps < 3 * args.block:
        parser.error(
            f"--steps {args.steps}: needs at least 3 blocks of --block {args.block}, and no rest"
        )
    os.environ["OMP_NUM_THREADS"] = str(max(args.threads))
    with tempfile.TemporaryDirectory() as work_dir:
        for job in make_jobs(args, Path(work_dir)):
            report(job, *race(job, args))


if __name__ == "__main__":
    main()
