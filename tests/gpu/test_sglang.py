"""The real SGLang on a card, with weights from a trainer on the same one. Run by scripts/gpu_first_hour.

Its environment is the one that the plan of configs/01 names; the checklist makes it before. With
ROLLOUTS_TEST_SGLANG=embedded the same runs on a CPU against the embedded engine, to try the tests themselves.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weights.publish import WeightPublisher
from rollouts.worker.engine_tools import with_tools
from rollouts.worker.environments.virtual_environment import is_complete
from scripts.gpu_first_hour_steps import engine_plan
from tests.engines.serving import EOS, VOCAB, await_health, make_tokenizer, serving, start
from tests.ports import free_port
from tests.weights.deliveries import IDS, delivery_of

ON_CPU = os.environ.get("ROLLOUTS_TEST_SGLANG") == "embedded"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
BF16_WITHIN = 0.25  # nats, of two forward passes in bfloat16
pytestmark = [
    *([] if ON_CPU else [pytest.mark.gpu]),
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of one architecture, with heads that its kernels take: what the engine starts with, and what is trained."""
    config = Qwen2Config(
        vocab_size=len(VOCAB),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    found = {}
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(found[name])
        make_tokenizer().save_pretrained(found[name])
    return found


@contextlib.contextmanager
def sglang(model: Path) -> Iterator[str]:
    """The server's URL; it is ended afterwards with all of its processes."""
    if ON_CPU:
        with serving(model) as url:
            yield url
        return
    launch, port = engine_plan(), free_port()
    spec = launch.stages[1].engines[0]
    if not is_complete(Path(spec.tools_of)):
        pytest.skip(
            f"needs SGLang's environment in {spec.tools_of}: scripts/gpu_first_hour --only environment"
        )
    argv = [*spec.argv]
    for flag, value in (
        ("--model-path", str(model)),
        ("--port", str(port)),
        ("--mem-fraction-static", "0.2"),
    ):
        argv[argv.index(flag) + 1] = value
    process = start(
        argv, with_tools({**os.environ, **spec.env}, Path(spec.tools_of), declared=spec.env)
    )
    try:
        await_health(f"http://127.0.0.1:{port}", process, "/ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture(scope="module")
def url(models: dict[str, Path]) -> Iterator[str]:
    with sglang(models["old"]) as made:
        yield made


@pytest.fixture
def backend(models: dict[str, Path], tmp_path: Path) -> PyTorchTrainingBackend:
    model = AutoModelForCausalLM.from_pretrained(models["new"], dtype=torch.float32).to(DEVICE)
    return PyTorchTrainingBackend(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        grpo_loss,
        tmp_path,
        DEVICE.type,
        compute_dtype="bfloat16",
    )


def log_probs(model: Any) -> list[float]:
    """A trainer's, in bfloat16 as the engine computes."""
    ids_1T = torch.tensor([IDS], device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        log_probs_TV = model.eval()(input_ids=ids_1T).logits[0, :-1].float().log_softmax(-1)
    return log_probs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist()  # type: ignore[no-any-return]


def shift(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(DEVICE), alpha=0.02)


def test_starts_twice(models: dict[str, Path]) -> None:
    """Goal: its kernels are built at the first start and found at the second; the seconds of both are shown."""
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        with sglang(models["old"]):
            seconds.append(time.monotonic() - started)
    print(f"\n> ready after {seconds[0]:.0f} s, then after {seconds[1]:.0f} s")


def test_scores_as_the_trainer_does(url: str, models: dict[str, Path]) -> None:
    """Goal: log-probs of the weights that it started with are the trainer's, to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(models["old"], dtype=torch.float32).to(DEVICE)

    async def ask() -> list[float]:
        async with SGLangEngine(url, timeout_s=120) as engine:
            return await engine.input_logprobs(IDS)

    assert anyio.run(ask) == pytest.approx(log_probs(model), abs=BF16_WITHIN)


@pytest.mark.parametrize("kind", ["disk", "tensor"])
@pytest.mark.parametrize("in_flight", [0, 64])
def test_sync(
    url: str, backend: PyTorchTrainingBackend, tmp_path: Path, kind: str, in_flight: int
) -> None:
    """Goal: pause, update, flush, version and proof, twice, also with requests under way: each of them is answered,
    and the engine then scores as the trainer does."""

    async def work() -> tuple[list[float], list[Any]]:
        rows: list[Any] = []
        async with SGLangEngine(url, timeout_s=120) as engine:
            publisher = WeightPublisher(
                backend,
                EnginePool.of([engine]),
                delivery_of(kind, backend, tmp_path / "weights"),
                dtype="bfloat16",
            )
            await publisher.publish(1)

            async def ask() -> None:
                rows.extend(await engine.generate(IDS, {"max_new_tokens": 400, "ignore_eos": True}))

            async with anyio.create_task_group() as group:
                for _ in range(in_flight):
                    group.start_soon(ask)
                await anyio.sleep(0.3)
                shift(backend.model, seed=1)
                await publisher.publish(2)
            served = await engine.input_logprobs(IDS)
            await publisher.aclose()
            return served, rows

    served, rows = anyio.run(work)
    assert served == pytest.approx(log_probs(backend.model), abs=BF16_WITHIN)
    assert len(rows) == in_flight and {len(row.output_ids) for row in rows} <= {400}
