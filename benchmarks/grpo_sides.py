"""The two sides of benchmarks/grpo.py: one rank of ours through the HTTP engine, and one of TRL's GRPOTrainer."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, SAMPLES = 16, 16
DEVICE_ROWS = 8  # TRL's default
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
    seed: int
    lag: int = 0  # steps that our engine samples ahead
    ranks: int = 1  # processes that train, each on its share of a step; and our engines
    tuned: bool = True  # TRL


def reward(text: str) -> float:
    """Share of the answer's characters that are small letters: a tenth for random weights, 1 once learned."""
    return sum("a" <= letter <= "z" for letter in text) / len(text) if text else 0.0


class Turns:
    """A side's end of the pipe: counts its steps, and after each block reports and waits for its next turn."""

    def __init__(self, pipe: Connection, block: int, helpers: Sequence[int] = ()) -> None:
        self._pipe, self._block = pipe, block
        self._helpers = helpers  # processes whose time counts too
        self._rewards: list[float] = []
        self._times: dict[str, float] = {}

    def begin(self) -> None:
        """Set-up is over; wait for the first turn."""
        self._pipe.send(self._helpers)
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()
        self._started = time.perf_counter()

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """After a step, with its "reward_mean" and any times "..._s"."""
        self._rewards.append(metrics["reward_mean"])
        for name, value in metrics.items():
            if name.endswith("_s") and not name.endswith("per_s"):
                self._times[name] = self._times.get(name, 0.0) + value / self._block
        if len(self._rewards) == self._block:
            self._pipe.send((time.perf_counter() - self._started, self._rewards, self._times))
            self._rewards, self._times = [], {}
            self._wait()

    # As a MetricsLogger of ours.

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.step_done(metrics)

    def finish(self) -> None:
        """Nothing is pending."""


# --- ours -----------------------------------------------------------------------------------------------------------


def run_ours(pipe: Connection | None, job: Job) -> None:
    """One rank; the first has the pipe and the engines."""
    import anyio
    import torch

    from rollouts.training import distributed

    torch.set_num_threads(job.threads)
    distributed.initialize("cpu")
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(_engine(job)) for _ in range(job.ranks if pipe else 0)]
        turns = Turns(pipe, job.block, [pid for _, pid in engines]) if pipe else None
        anyio.run(_train_ours, turns, job, [url for url, _ in engines])
    distributed.shutdown()


async def _train_ours(turns: Turns | None, job: Job, urls: Sequence[str]) -> None:
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
    backend = PyTorchTrainingBackend(
        model, optimizer, grpo_loss, Path(job.work_dir) / "ours", max_grad_norm=1.0
    )
    config = RLTrainingConfig(
        num_steps=job.steps,
        baseline="group_mean",
        advantage_norm="group_std",
        micro_batch_tokens=16384,
        policy_lag_steps_max=job.lag,
    )
    if turns is None:
        await run_rl_training(backend, None, None, [], config)
        return
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SGLangEngine(url)) for url in urls]
        for engine in engines:
            await engine.wait_ready(READY_TIMEOUT_S)
        rollouts = RolloutConfig(
            batch_size=PROMPTS,
            n_samples_per_prompt=SAMPLES,
            generate_fn=make_generate_fn(
                engines, tokenizer, max_new_tokens=job.new_tokens, temperature=1.0
            ),
            reward_fn=lambda sample: reward(sample.response),
            seed=job.seed,
        )
        buffer = _InOrder(job.prompts)
        manager = await stack.enter_async_context(AsyncRolloutManager(buffer, rollouts))  # type: ignore[arg-type]
        turns.begin()
        await run_rl_training(backend, buffer, manager, engines, config, metrics_logger=turns)


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
    port = free_port()
    argv = [
        sys.executable,
        "-m",
        "rollouts.engines.embedded",
        "--model-path",
        job.model_dir,
        "--port",
        str(port),
    ]
    argv += ["--max-running-requests", str(PROMPTS * SAMPLES)]
    process = subprocess.Popen(
        argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    )
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- TRL ------------------------------------------------------------------------------------------------------------


def run_trl(pipe: Connection | None, job: Job) -> None:
    """One rank; the first has the pipe."""
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from rollouts.training.model_loading import load_model, load_tokenizer

    torch.set_num_threads(job.threads)
    turns = Turns(pipe, job.block) if pipe else None

    class AfterEachStep(transformers.TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any
        ) -> None:
            if turns and "reward" in logs:
                turns.step_done({"reward_mean": logs["reward"]})

        def on_train_begin(self, *others: Any, **named: Any) -> None:
            if turns:
                turns.begin()

    def reward_fn(completions: list[Any], **others: Any) -> list[float | None]:
        return [reward(completion[0]["content"]) for completion in completions]

    rows = PROMPTS * SAMPLES // job.ranks
    device_rows = rows if job.tuned else DEVICE_ROWS
    config = GRPOConfig(
        output_dir=str(Path(job.work_dir) / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=not job.tuned,
        seed=job.seed,
        max_steps=job.steps,
        per_device_train_batch_size=device_rows,
        gradient_accumulation_steps=rows // device_rows,
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
