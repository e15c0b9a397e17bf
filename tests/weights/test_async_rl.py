"""RL that generates ahead of training, on the real SGLang on a CPU: which weights sampled what, by kind of sync."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.inference.http import EngineError
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.weight_routes import WeightRoutes
from rollouts.training.loops import run_rl_training
from rollouts.training.rl_losses import policy_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.types import RLTrainingConfig, RolloutConfig, Sample
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weights.publish import WeightPublisher
from tests.engines.serving import logprobs_of, make_tokenizer
from tests.weights.deliveries import delivery_of

pytestmark = pytest.mark.anyio
GROUPS, SAMPLES = 2, 4
TOLERANCE = 1e-4
PROMPTS = ["abcdefgh"[: 2 + number % 6] + "xyz"[number % 3] for number in range(40)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LONG = 80  # tokens an answer: longer than a step and its sync take
ENDLESS = 1900  # tokens an answer: SGLang would be at it for a minute


class LongAnswers(SGLangEngine):
    """Never stops before the limit. With `holds`, and from the first update on, what it is asked for is sent when the
    next update begins, which so finds it running; it is then for `held_tokens`, if given.
    """

    def __init__(
        self, *arguments: Any, holds: bool = False, held_tokens: int | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.asked, self.updated = anyio.Event(), anyio.Event()
        self._holds, self._held_tokens = holds, held_tokens
        self._due: anyio.Event | None = None

    async def generate_batch(self, prompts: Any, sampling_params: Any, **options: Any) -> Any:
        params = [{**item, "ignore_eos": True} for item in sampling_params]
        for item in params:
            item.pop("stop_token_ids", None)
        self.asked.set()
        if self._due is not None:
            await self._due.wait()
            params = [
                {**item, "max_new_tokens": self._held_tokens or item["max_new_tokens"]}
                for item in params
            ]
        return await super().generate_batch(prompts, params, **options)

    async def before_update(self) -> None:
        """Send what waits, and return once it runs: servers take requests in order, so once a later one is through."""
        if self._due is not None:
            self._due.set()
            await anyio.sleep(0.05)
            await self.generate([9], {"max_new_tokens": 1})

    @cached_property
    def weights(self) -> WeightRoutes:
        return SlowToEnd(self)

    async def end_of_update(self) -> None:
        if self._due is not None:
            self.updated.set()
            await anyio.sleep(0.1)  # time for the test, which waits for this moment

    def after_update(self, version: int) -> None:
        self._due = anyio.Event() if self._holds and version > 0 else None


class SlowToEnd(WeightRoutes):
    def __init__(self, engine: LongAnswers) -> None:
        super().__init__(engine)
        self._engine = engine

    async def end_weight_update(self) -> None:
        await self._engine.end_of_update()
        await super().end_weight_update()


@dataclass
class Run:
    """A trainer with its engine, and what a run leaves."""

    engine: LongAnswers
    kind: str
    model_path: Path
    directory: Path
    max_new_tokens: int
    metrics: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)  # by version

    async def train(self, num_steps: int, *, in_flight: bool) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)
        loss_fn = partial(policy_loss, loss="grpo", importance="token_truncate", importance_cap=2.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        backend = PyTorchTrainingBackend(model, optimizer, loss_fn, self.directory)
        delivery = delivery_of(self.kind, backend, self.directory / "weights")
        publisher = RecordingPublisher(
            backend, EnginePool.of([self.engine]), delivery, dtype="float32"
        )
        publisher.models = self.models
        advantages = {"baseline": "group_mean", "advantage_norm": "group_std"}
        config = RLTrainingConfig(
            num_steps, policy_lag_steps_max=1, in_flight_updates=in_flight, **advantages
        )
        manager = self._manager(one_request_per_group=in_flight)
        try:
            self.metrics = await run_rl_training(
                backend,
                manager.buffer,
                manager,
                [self.engine],
                config,
                weight_sync=publisher,
                rollouts_logger=self,
            )
        finally:
            with anyio.CancelScope(shield=True):
                await publisher.aclose()

    def _manager(self, *, one_request_per_group: bool) -> AsyncRolloutManager:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = TEMPLATE
        generate_fn = make_generate_fn(
            [self.engine],
            tokenizer,
            max_new_tokens=self.max_new_tokens,
            temperature=1.0,
            one_request_per_group=one_request_per_group,
        )
        config = RolloutConfig(
            batch_size=GROUPS,
            n_samples_per_prompt=SAMPLES,
            generate_fn=generate_fn,
            reward_fn=early_letters,
            seed=3,
        )
        return AsyncRolloutManager(DataBuffer(PROMPTS, seed=2), config)

    def log(self, record: Any, step: int) -> None:
        self.samples.append({**record, "step": step})

    def finish(self) -> None:
        """A MetricsLogger of samples."""

    def check_log_probs(self, sample: dict[str, Any], spans: list[dict[str, Any]]) -> None:
        """Each span's are those of the weights that it names."""
        length = sample["response_length"]
        assert spans[0]["start"] == 0 and spans[-1]["end"] == length
        assert [span["end"] for span in spans[:-1]] == [span["start"] for span in spans[1:]]
        prompt, output = sample["tokens"][:-length], sample["tokens"][-length:]
        for span in spans:
            part = slice(span["start"], span["end"])
            expected = logprobs_of(self.models[span["version"]], prompt, output, 1.0)[part]
            assert sample["rollout_log_probs"][part] == pytest.approx(expected, abs=TOLERANCE)


class RecordingPublisher(WeightPublisher):
    """Keeps the model of every version, and tells the engine."""

    models: dict[str, Any]

    async def publish(self, version: int) -> None:
        (engine,) = self._pool.clients
        self.models[str(version)] = copy.deepcopy(self._backend.model).eval()
        await engine.before_update()
        await super().publish(version)
        engine.after_update(version)


def early_letters(sample: Sample) -> float:
    return sum("a" <= letter <= "h" for letter in sample.response) / max(1, len(sample.response))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are small, and SGLang wants a core too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_step_ahead(sglang_url: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Goal: without in-flight updates step t trains on whole answers of the weights t - 2, with their log-probs. Red
    with answers of 250 tokens, and updates that do not wait for them.
    """
    async with LongAnswers(sglang_url, timeout_s=200) as engine:
        run = Run(engine, "disk", models["new"], tmp_path, max_new_tokens=LONG)
        await run.train(4, in_flight=False)
    assert [row["lag_max"] for row in run.metrics] == [0, 1, 1, 1]
    assert {(s["step"], s["weight_version"]) for s in run.samples} == {
        (t, str(max(0, t - 2))) for t in range(1, 5)
    }
    # of the weights that train
    assert all(row["logp_diff_abs"] > TOLERANCE for row in run.metrics[1:])
    for sample in run.samples:
        assert "weight_versions" not in sample["metadata"]
        version = {
            "version": sample["weight_version"],
            "start": 0,
            "end": sample["response_length"],
        }
        run.check_log_probs(sample, [version])


@pytest.mark.parametrize(
    ("kind", "anyio_backend"), [("disk", "asyncio"), ("tensor", "trio"), ("broadcast", "asyncio")]
)
async def test_updates_in_flight(
    kind: str, sglang_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Goal: answers go on under new weights, whichever way these come; each token has the version and the log-prob of
    the weights that sampled it. Red with the spans left out of the samples.
    """
    async with LongAnswers(sglang_url, holds=True, timeout_s=200) as engine:
        run = Run(engine, kind, models["new"], tmp_path, max_new_tokens=LONG)
        await run.train(4, in_flight=True)
    assert [row["lag_max"] for row in run.metrics] == [0, 1, 1, 1]
    assert [row["partial_frac"] for row in run.metrics] == [0, 0, 1, 1]
    for sample in run.samples[2 * GROUPS * SAMPLES :]:
        spans = sample["metadata"]["weight_versions"]
        assert [span["version"] for span in spans] == [
            str(sample["step"] - 2),
            str(sample["step"] - 1),
        ]
        run.check_log_probs(sample, spans)
        with pytest.raises(AssertionError):  # as another version's they would not do
            run.check_log_probs(sample, [{**span, "version": "0"} for span in spans])


@pytest.mark.parametrize(("moment", "anyio_backend"), [("asked", "asyncio"), ("updated", "trio")])
async def test_cancellation_leaves_nothing_running(
    moment: str, sglang_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Goal: whoever cancels the loop, while SGLang samples or in the middle of an update, finds it idle. The loop's
    abort and SGLang's own look at its clients each do it alone: without the first it was still green.
    """
    async with LongAnswers(sglang_url, holds=True, held_tokens=ENDLESS, timeout_s=200) as engine:
        tokens = LONG if moment == "updated" else ENDLESS
        run = Run(engine, "tensor", models["new"], tmp_path, max_new_tokens=tokens)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(run.train, 4, in_flight=True))
            await getattr(engine, moment).wait()
            await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        if moment == "updated":  # as the engine of the next test should find it
            await WeightRoutes(engine).end_weight_update()
            await engine.resume()
        with anyio.fail_after(60):  # ENDLESS takes longer
            while True:
                with contextlib.suppress(EngineError):  # it is refused while anything runs
                    await engine.flush_cache()
                    return
                await anyio.sleep(0.1)
