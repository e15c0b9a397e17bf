"""One GRPO step, ours through the HTTP engine beside TRL's GRPOTrainer: steps/s of both, their ratio, reward curves.

    python -m benchmarks.grpo [--new-tokens 8 128] [--threads 1 2] [--lag 0 1] [--steps 60] [--seeds 0 1 2]

16 prompts x 16 samples a step, a 2-layer, 64-wide Qwen2 in float32. All sides start from the same weights and see the
same prompts in the same order, the same reward, loss (token mean, no KL), advantages (group mean, group std), AdamW and
sampling. Ours is what a run does: a real embedded engine process over HTTP, `run_rl_training`, new weights in the
engine after every step. TRL generates in its own process with transformers (`use_vllm=False`).

Each stands once for each of `--threads` torch threads a process, and TRL's fastest counts. With `--lag 0` our engine
and trainer work in turn, never at once, so no side computes on more than that many cores; this is the ratio. With
`--lag N` the engine samples at most N steps ahead, beside the trainer: one thread each, two cores; printed beside it.

All live at once, and take turns of `--block` steps while the others wait; ratios are medians over rounds of turns, so
that a busy machine slows all. (An engine that works ahead has up to N batches ready when its turn begins.)
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs" / "models" / "tiny_qwen2"
PROMPTS, SAMPLES = 16, 16
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Job:
    """What both sides are given."""

    model_dir: str
    work_dir: str
    prompts: tuple[str, ...]  # in the order in which they are used
    new_tokens: int
    steps: int
    block: int
    lr: float
    threads: int
    lag: int  # steps that our engine samples ahead
    seed: int


def reward(text: str) -> float:
    """Share of the answer's characters that are small letters: a tenth for random weights, 1 once learned."""
    return sum("a" <= letter <= "z" for letter in text) / len(text) if text else 0.0


class Turns:
    """A side's end of the pipe: counts its steps, and after each block reports and waits for its next turn."""

    def __init__(self, pipe: Connection, block: int, cpu_s: Callable[[], float]) -> None:
        self._pipe, self._block, self._cpu_s = pipe, block, cpu_s
        self._rewards: list[float] = []
        self._times: dict[str, float] = {}

    def begin(self) -> None:
        """Set-up is over; wait for the first turn."""
        self._pipe.send(None)
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()
        self._started = time.perf_counter(), self._cpu_s()

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """After a step, with its "reward_mean" and any times "..._s"."""
        self._rewards.append(metrics["reward_mean"])
        for name, value in metrics.items():
            if name.endswith("_s") and not name.endswith("per_s"):
                self._times[name] = self._times.get(name, 0.0) + value / self._block
        if len(self._rewards) == self._block:
            wall_s, cpu_s = time.perf_counter() - self._started[0], self._cpu_s() - self._started[1]
            self._pipe.send((wall_s, cpu_s, self._rewards, self._times))
            self._rewards, self._times = [], {}
            self._wait()

    # As a MetricsLogger of ours.

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.step_done(metrics)

    def finish(self) -> None:
        """Nothing is pending."""


# --- ours -----------------------------------------------------------------------------------------------------------


def run_ours(pipe: Connection, job: Job) -> None:
    import anyio
    import torch

    torch.set_num_threads(job.threads)
    with _engine(job) as (url, engine_pid):
        turns = Turns(pipe, job.block, lambda: time.process_time() + _cpu_s(engine_pid))
        anyio.run(_train_ours, turns, job, url)


async def _train_ours(turns: Turns, job: Job, url: str) -> None:
    import torch

    from rollouts.training import (
        AsyncRolloutManager,
        PyTorchTrainingBackend,
        RLTrainingConfig,
        RolloutConfig,
        run_rl_training,
    )
    from rollouts.training.model_loading import load_model, load_tokenizer
    from rollouts.training.rl_losses import grpo_loss
    from rollouts.training.rollout_gen.engine_generate import make_generate_fn
    from rollouts.training.weight_sync import SGLangEngine

    model, tokenizer = load_model(job.model_dir), load_tokenizer(job.model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    backend = PyTorchTrainingBackend(model, optimizer, grpo_loss, Path(job.work_dir) / "ours", max_grad_norm=1.0)
    async with SGLangEngine(url) as engine:
        await engine.wait_ready(READY_TIMEOUT_S)
        rollouts = RolloutConfig(
            batch_size=PROMPTS,
            n_samples_per_prompt=SAMPLES,
            generate_fn=make_generate_fn([engine], tokenizer, max_new_tokens=job.new_tokens, temperature=1.0),
            reward_fn=lambda sample: reward(sample.response),
            seed=job.seed,
        )
        buffer = _InOrder(job.prompts)
        config = RLTrainingConfig(
            num_steps=job.steps,
            baseline="group_mean",
            advantage_norm="group_std",
            micro_batch_tokens=4096,
            policy_lag_steps_max=job.lag,
        )
        turns.begin()
        async with AsyncRolloutManager(buffer, rollouts) as manager:  # type: ignore[arg-type]
            await run_rl_training(backend, buffer, manager, [engine], config, metrics_logger=turns)


class _InOrder:
    """The prompts in the order given, as a DataBuffer would hand them out."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts, self._next = prompts, 0

    def get_prompts(self, count: int) -> list[str]:
        self._next += count
        return list(self._prompts[self._next - count : self._next])

    def save_state(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]


@contextlib.contextmanager
def _engine(job: Job) -> Iterator[tuple[str, int]]:
    """An embedded engine over the job's model; its URL and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "rollouts.engines.embedded", "--model-path", job.model_dir, "--port", str(port)]
    argv += ["--max-running-requests", str(PROMPTS * SAMPLES)]
    process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(job.threads)})
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(timeout=20)


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- TRL ------------------------------------------------------------------------------------------------------------


def run_trl(pipe: Connection, job: Job) -> None:
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from rollouts.training.model_loading import load_model, load_tokenizer

    torch.set_num_threads(job.threads)
    turns = Turns(pipe, job.block, time.process_time)

    class AfterEachStep(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "reward" in logs:
                turns.step_done({"reward_mean": logs["reward"]})

        def on_train_begin(self, *others: Any, **named: Any) -> None:
            turns.begin()

    def reward_fn(completions: list[Any], **others: Any) -> list[float | None]:
        return [reward(completion[0]["content"]) for completion in completions]

    config = GRPOConfig(
        output_dir=str(Path(job.work_dir) / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=job.seed,
        max_steps=job.steps,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        shuffle_dataset=False,
        max_completion_length=job.new_tokens,
        temperature=1.0,
        top_k=0,
        use_vllm=False,
        beta=0.0,
        loss_type="dapo",  # the mean over the step's tokens
        scale_rewards="group",
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prompts = [[{"role": "user", "content": prompt}] for prompt in job.prompts]
    trainer = GRPOTrainer(
        model=load_model(job.model_dir),
        reward_funcs=reward_fn,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=load_tokenizer(job.model_dir),
        callbacks=[AfterEachStep()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


# --- the race -------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A side's process, and what it has reported so far."""

    name: str
    pipe: Connection
    process: Any
    wall_s: list[float]  # of each block
    cpu_s: list[float]
    rewards: list[float]
    times: list[dict[str, float]]

    @property
    def block_s(self) -> float:
        """The median turn; the first, in which everything warms up, left out."""
        return statistics.median(self.wall_s[1:])

    def take_turn(self) -> None:
        self.pipe.send(None)
        wall_s, cpu_s, rewards, times = self.pipe.recv()
        self.wall_s.append(wall_s)
        self.cpu_s.append(cpu_s)
        self.rewards += rewards
        self.times.append(times)


@contextlib.contextmanager
def running(name: str, target: Callable[[Connection, Job], None], job: Job) -> Iterator[Side]:
    """A process of its own for `target`, ready for its first turn."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(there, job), name=name)
    process.start()
    there.close()
    try:
        here.recv()
        yield Side(name, here, process, [], [], [], [])
        here.send(None)
        process.join(timeout=60)
    finally:
        process.terminate()
        process.join()


def race(job: Job, threads: Sequence[int], lags: Sequence[int]) -> tuple[list[Side], list[Side]]:
    """Ours and TRL's, each with each number of threads, run in turns."""
    with contextlib.ExitStack() as stack:

        def start(name: str, target: Callable[[Connection, Job], None], threads: int, lag: int = 0) -> Side:
            return stack.enter_context(running(name, target, replace(job, threads=threads, lag=lag)))

        ours = [start(f"ours, {count} threads", run_ours, count) for count in threads if 0 in lags]
        ours += [start(f"ours, lag {lag}, 1 thread", run_ours, 1, lag) for lag in lags if lag > 0]
        trl = [start(f"trl, {count} threads", run_trl, count) for count in threads]
        for _ in range(job.steps // job.block):
            for side in (*ours, *trl):
                side.take_turn()
    return ours, trl


def report(job: Job, ours: Sequence[Side], trl: Sequence[Side]) -> None:
    best = min(trl, key=lambda side: side.block_s)
    print(f"\n<= {job.new_tokens} new tokens, seed {job.seed}: {job.steps} steps in blocks of {job.block}")
    print(f"  ratios are to {best.name}, TRL's fastest here")
    for side in (*ours, *trl):
        speed = job.block / side.block_s
        cpu_ms = 1000 * statistics.median(side.cpu_s[1:]) / job.block
        curve = " ".join(
            f"{statistics.fmean(side.rewards[start : start + job.block]):.3f}"
            for start in range(0, job.steps, job.block)
        )
        rewards = f"reward {curve}, last third {last_third(side.rewards):.3f}"
        print(f"  {side.name:20} {speed:6.2f} steps/s {cpu_ms:7.1f} ms of CPU a step   {rewards}")
    for side in ours:
        ratios = [theirs / own for own, theirs in zip(side.wall_s[1:], best.wall_s[1:], strict=True)]
        cpu_ratios = [theirs / own for own, theirs in zip(side.cpu_s[1:], best.cpu_s[1:], strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  ratio of {side.name}: {statistics.median(ratios):5.2f}   (median of {each})", end="")
        print(f", of CPU time {statistics.median(cpu_ratios):.2f}")
        parts = {name: statistics.median(block[name] for block in side.times[1:]) for name in side.times[1]}
        print("    ms a step: " + ", ".join(f"{name} {1000 * value:.1f}" for name, value in parts.items()))


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
        words = tuple("".join(rng.choices("abcdefghij", k=rng.randint(3, 6))) for _ in range(PROMPTS * args.steps))
        for new_tokens in args.new_tokens:
            yield Job(
                *(str(model_dir), str(work_dir), words, new_tokens),
                *(args.steps, args.block, args.lr, 1, 0, seed),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lag", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.steps % args.block or args.steps < 3 * args.block:
        parser.error(f"--steps {args.steps}: needs at least 3 blocks of --block {args.block}, and no rest")
    os.environ["OMP_NUM_THREADS"] = str(max(args.threads))
    with tempfile.TemporaryDirectory() as work_dir:
        for job in make_jobs(args, Path(work_dir)):
            report(job, *race(job, args.threads, args.lag))


if __name__ == "__main__":
    main()
