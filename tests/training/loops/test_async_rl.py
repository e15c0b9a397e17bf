"""RL that generates ahead of training, against a real embedded engine: bits, overlap, versions of tokens, resuming,
and that nothing runs at the engine once the trainer is gone.

As a program (`python -m tests.training.loops.test_async_rl URL DIRECTORY`) this trains until it is interrupted.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops import prepare_grpo_batch, run_rl_training
from rollouts.training.loops.train_step import train_step
from rollouts.training.model_loading import load_model
from rollouts.training.rl_losses import policy_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.types import RLTrainingConfig, RolloutConfig, Sample
from rollouts.training.weight_sync import SGLangEngine, sync_weights_to_engines
from tests.engines.serving import START_TIMEOUT_S, logprobs_of, serving, wait_for
from tests.training import tiny_task

REPOSITORY = Path(__file__).resolve().parents[3]
BATCH, SAMPLES, NEW_TOKENS, LONG = 4, 4, 6, 240
PROMPTS = [
    {"messages": [{"role": "user", "content": "abcdefgh"[: 1 + n % 8]}], "answer": str(n)}
    for n in range(40)
]
EXACT = (
    "loss",
    "grad_norm",
    "reward_mean",
    "lag_mean",
    "lag_max",
    "entropy",
    "logp_diff_abs",
    "partial_frac",
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_task.tiny_model(seed=1).save_pretrained(path)
    tiny_task.tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine_url(model_path: Path) -> Iterator[str]:
    with serving(model_path, max_running_requests="256") as url:
        yield url


def small_letters(sample: Sample) -> float:
    return sum("a" <= letter <= "z" for letter in sample.response) / max(1, len(sample.response))


class LongAnswers(SGLangEngine):
    """Never stops before the limit."""

    async def generate_batch(self, prompts: Any, sampling_params: Any, **options: Any) -> Any:
        params = [{**item, "ignore_eos": True} for item in sampling_params]
        for item in params:
            item.pop("stop_token_ids", None)
        return await super().generate_batch(prompts, params, **options)


def make_manager(
    engine: SGLangEngine, *, max_new_tokens: int = NEW_TOKENS, **config: Any
) -> AsyncRolloutManager:
    tokenizer = tiny_task.tiny_tokenizer()
    generate_fn = make_generate_fn(
        [engine], tokenizer, max_new_tokens=max_new_tokens, temperature=1.0
    )
    config = {"reward_fn": small_letters, "seed": 3, **config}
    config = {
        "batch_size": BATCH,
        "n_samples_per_prompt": SAMPLES,
        "generate_fn": generate_fn,
        **config,
    }
    return AsyncRolloutManager(DataBuffer(PROMPTS, seed=2), RolloutConfig(**config))


def make_backend(
    directory: Path, kind: type[PyTorchTrainingBackend] = PyTorchTrainingBackend
) -> PyTorchTrainingBackend:
    model = tiny_task.tiny_model(seed=1)
    loss_fn = partial(policy_loss, loss="grpo", importance="token_truncate", importance_cap=2.0)
    return kind(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_fn,
        directory / "rl",
        max_grad_norm=1.0,
    )


def training_config(num_steps: int, lag: int, **options: Any) -> RLTrainingConfig:
    advantages = {"baseline": "group_mean", "advantage_norm": "group_std"}
    return RLTrainingConfig(
        num_steps=num_steps, policy_lag_steps_max=lag, **{**advantages, **options}
    )


class Run:
    """A whole run, and what it left."""

    def __init__(
        self,
        url: str,
        directory: Path,
        config: RLTrainingConfig,
        *,
        runtime: str = "asyncio",
        engine: SGLangEngine | None = None,
        backend: PyTorchTrainingBackend | None = None,
        resume: bool = False,
        max_new_tokens: int = NEW_TOKENS,
        reward_fn: Any = small_letters,
        **options: Any,
    ) -> None:
        self.samples: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.backend = backend or make_backend(directory)
        self.engine = engine or SGLangEngine(url)

        async def main() -> None:
            manager = make_manager(self.engine, max_new_tokens=max_new_tokens, reward_fn=reward_fn)
            state = (
                await self.backend.load_checkpoint(directory / "rl" / "latest") if resume else None
            )
            keywords = {"rollouts_logger": self, "resume": state, **options}
            async with self.engine:
                self.metrics = await run_rl_training(
                    self.backend, manager.buffer, manager, [self.engine], config, **keywords
                )

        anyio.run(main, backend=runtime)

    def log(self, record: Any, step: int) -> None:
        self.samples.append({**record, "step": step})

    def finish(self) -> None:
        """A MetricsLogger of samples."""

    def exact(self) -> list[dict[str, float]]:
        return [{key: row[key] for key in EXACT} for row in self.metrics]

    def sampled(self) -> list[tuple[Any, ...]]:
        return [
            (s["step"], s["tokens"], s["rollout_log_probs"], s["weight_version"])
            for s in self.samples
        ]

    def weights(self) -> torch.Tensor:
        return torch.cat(
            [parameter.detach().flatten() for parameter in self.backend.model.parameters()]
        )


@pytest.fixture(scope="module")
def ahead(engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps, one step ahead, undisturbed."""
    return Run(engine_url, tmp_path_factory.mktemp("ahead"), training_config(6, 1))


def test_lag_0_is_bit_for_bit_the_plain_loop(engine_url: str, tmp_path: Path) -> None:
    """Goal: synchronous RL is the special case: samples, metrics and weights of a loop written out by hand.

    Red with a lag of 1.
    """
    run = Run(engine_url, tmp_path / "run", training_config(4, 0))
    backend, losses = make_backend(tmp_path / "plain"), []

    async def plain() -> None:
        async with SGLangEngine(engine_url) as engine:
            manager = make_manager(engine)
            for step in range(5):
                path = await backend.save_weights(tmp_path / f"version_{step}")
                await sync_weights_to_engines([engine], str(path), weight_version=str(step))
                if step < 4:
                    rollouts = await manager.generate_batch()
                    batch = prepare_grpo_batch(rollouts, rollouts.rewards, training_config(4, 0))
                    losses.append((await train_step(backend, batch, None))["loss"])

    anyio.run(plain)
    assert [row["loss"] for row in run.metrics] == losses
    assert run.weights().equal(
        torch.cat([parameter.detach().flatten() for parameter in backend.model.parameters()])
    )
    assert [row["lag_max"] for row in run.metrics] == [0] * 4
    assert {row["logp_diff_abs"] for row in run.metrics} == {0.0}


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_one_step_ahead_is_a_function_of_the_seeds(
    ahead: Run, engine_url: str, tmp_path: Path, runtime: str
) -> None:
    """Goal: two runs agree in every bit, whatever the timing: step t trains on samples of weights t - 2. Red when an
    update did not wait for what runs.
    """
    again = Run(engine_url, tmp_path, training_config(6, 1), runtime=runtime)
    assert again.sampled() == ahead.sampled() and again.exact() == ahead.exact()
    assert again.weights().equal(ahead.weights())
    assert [row["lag_max"] for row in ahead.metrics] == [0, 1, 1, 1, 1, 1]
    assert {(s["step"], s["weight_version"]) for s in ahead.samples} == {
        (t, str(max(0, t - 2))) for t in range(1, 7)
    }
    # the loss's ratio has something to correct
    assert all(row["logp_diff_abs"] > 0 for row in ahead.metrics[1:])


def test_generation_goes_on_while_a_step_trains(engine_url: str, tmp_path: Path) -> None:
    """Goal: training does not block the event loop: step 2's backward pass ends only once step 3's samples are scored.

    Red with the backend's work run in the loop's own thread.
    """
    scored = threading.Event()

    def reward_fn(sample: Sample) -> float:
        if sample.metadata["weight_version"] == "1":
            scored.set()
        return small_letters(sample)

    class Waiting(PyTorchTrainingBackend):
        def forward_backward(self, batch: Any) -> Any:
            self.on_model(self.wait)  # in turn, on the thread of the work
            return super().forward_backward(batch)

        def wait(self, model: Any) -> None:
            assert self.step != 1 or scored.wait(timeout=200), "nothing was generated meanwhile"

    run = Run(
        engine_url,
        tmp_path,
        training_config(3, 1),
        backend=make_backend(tmp_path, Waiting),
        reward_fn=reward_fn,
    )
    assert len(run.metrics) == 3


class Recording(LongAnswers):
    """Keeps the weights of every version."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.models: dict[str, Any] = {}

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> Any:
        assert weight_version is not None
        self.models[weight_version] = load_model(checkpoint_path).eval()
        return await super().update_weights_from_checkpoint(checkpoint_path, weight_version)


def test_in_flight_updates(engine_url: str, tmp_path: Path) -> None:
    """Goal: requests go on under new weights; every token has the version and the log-prob of the weights that sampled
    it; the bound holds; evaluations see one version. Red with the spans of the engine left out of the samples, and with
    updates that wait.
    """
    engine = Recording(engine_url)

    async def evaluate(step: int) -> dict[str, float]:
        params = {"temperature": 0.0, "max_new_tokens": 8}
        ((answer,),) = await engine.generate_batch([[5, 6, 7]], [params], n=1)
        assert {span["version"] for span in answer.weight_versions} == {str(step)}
        return {"answers": 1.0}

    config = training_config(6, 2, in_flight_updates=True)
    run = Run(
        engine_url,
        tmp_path,
        config,
        engine=engine,
        max_new_tokens=160,
        eval_fn=evaluate,
        eval_every=3,
    )
    crossed = [sample for sample in run.samples if "weight_versions" in sample["metadata"]]
    assert crossed
    assert sum(row["partial_frac"] for row in run.metrics) * BATCH * SAMPLES == pytest.approx(
        len(crossed)
    )
    assert max(row["lag_max"] for row in run.metrics) == 2
    for sample in crossed:
        spans = sample["metadata"]["weight_versions"]
        assert spans[0]["start"] == 0 and spans[-1]["end"] == sample["response_length"]
        assert sample["step"] - 1 - int(spans[0]["version"]) <= 2
    sample = crossed[0]
    length = sample["response_length"]
    prompt, output = sample["tokens"][:-length], sample["tokens"][-length:]
    for span in sample["metadata"]["weight_versions"]:
        part = slice(span["start"], span["end"])
        expected = logprobs_of(engine.models[span["version"]], prompt, output, 1.0)[part]
        assert sample["rollout_log_probs"][part] == pytest.approx(expected, abs=1e-4)
    other = logprobs_of(engine.models["0"], prompt, output, 1.0)
    newest = slice(sample["metadata"]["weight_versions"][-1]["start"], length)
    assert sample["rollout_log_probs"][newest] != pytest.approx(other[newest], abs=1e-4)


class Killed(Exception):
    pass


class KillsAt:
    """A metrics logger that ends the run after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def log(self, metrics: Any, step: int) -> None:
        if step == self._step:
            raise Killed

    def finish(self) -> None:
        """Nothing is pending."""


def test_a_killed_run_resumes_bit_for_bit(ahead: Run, engine_url: str, tmp_path: Path) -> None:
    """Goal: ended after step 5, with the next step's samples under way, and resumed from the checkpoint of step 4, it
    ends as the undisturbed run does. Red when what was running at the checkpoint was left out of its state.
    """
    config = training_config(6, 1, checkpoint_every=2)

    async def evaluate(step: int) -> dict[str, float]:
        """Time for the next groups to begin, before the checkpoint."""
        await anyio.sleep(0.01)
        return {}

    with pytest.raises(Killed):
        Run(engine_url, tmp_path, config, metrics_logger=KillsAt(5), eval_fn=evaluate, eval_every=1)
    resumed = Run(engine_url, tmp_path, config, resume=True)
    assert resumed.sampled() == [row for row in ahead.sampled() if row[0] > 4]
    assert resumed.exact() == ahead.exact()[4:]
    assert resumed.weights().equal(ahead.weights())


def running(url: str) -> int:
    state = httpx.get(f"{url}/server_info", timeout=60).json()["internal_states"][0]
    return int(state["running"]) + int(state["waiting"])


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
@pytest.mark.parametrize("lag", [0, 1])
def test_cancellation_leaves_no_request_at_the_engine(
    engine_url: str, tmp_path: Path, runtime: str, lag: int
) -> None:
    """Goal: whoever cancels the loop finds the engine idle. Red when the loop does not abort and the engine does not
    look whether its client is gone; each alone does it.
    """
    backend = make_backend(tmp_path)

    async def main() -> None:
        async with LongAnswers(engine_url) as engine, anyio.create_task_group() as tasks:
            manager = make_manager(engine, max_new_tokens=LONG)
            train = partial(
                run_rl_training, backend, manager.buffer, manager, [engine], training_config(2, lag)
            )
            tasks.start_soon(train)
            await anyio.to_thread.run_sync(wait_for, lambda: running(engine_url) > 0)
            tasks.cancel_scope.cancel()

    anyio.run(main, backend=runtime)
    assert running(engine_url) == 0


def test_ctrl_c_leaves_no_request_at_the_engine(engine_url: str, tmp_path: Path) -> None:
    """Goal: as above, of a trainer in a process of its own that gets SIGINT. Red likewise."""
    command = [sys.executable, "-m", __name__, engine_url, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while running(engine_url) == 0:
                assert process.poll() is None and time.monotonic() < deadline, "it never sampled"
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=START_TIMEOUT_S)
        finally:
            process.kill()
    assert running(engine_url) == 0
    assert "KeyboardInterrupt" in errors.strip().splitlines()[-1], errors


def main(url: str, directory: Path) -> None:
    Run(url, directory, training_config(100, 1), engine=LongAnswers(url), max_new_tokens=LONG)


if __name__ == "__main__":
    # a background process may have been told to ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(sys.argv[1], Path(sys.argv[2]))
