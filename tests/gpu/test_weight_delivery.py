"""CUDA IPC: the trainer's weights read by an engine on the same card. Run by scripts/gpu_check."""

from pathlib import Path

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weights.publish import WeightPublisher
from tests.engines.serving import make_model, serving
from tests.weights.deliveries import IDS, change, delivery_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_buckets_over_cuda_ipc(tmp_path: Path) -> None:
    """Goal: two syncs, by IPC handles into buffers that are used again, and the engine scores as the trainer does."""
    old, new = (
        make_model("qwen2-tied", tmp_path / name, seed=seed)
        for seed, name in enumerate(("old", "new"))
    )
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backend = PyTorchTrainingBackend(model, optimizer, grpo_loss, tmp_path, "cuda")

    async def work(url: str) -> list[float]:
        async with SGLangEngine(url, timeout_s=60) as engine:
            publisher = WeightPublisher(
                backend,
                EnginePool.of([engine]),
                delivery_of("tensor", backend, tmp_path),
                dtype="float32",
            )
            await publisher.publish(1)
            backend.model.cpu()
            change(backend, seed=1)
            backend.model.cuda()
            await publisher.publish(2)
            served = await engine.input_logprobs(IDS)
            await publisher.aclose()
            return served

    with serving(old, device="cuda") as url:
        served = anyio.run(work, url)
    ids_1T = torch.tensor([IDS], device="cuda")
    with torch.no_grad():
        log_probs_TV = backend.model.eval()(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
    expected = log_probs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist()
    assert served == pytest.approx(expected, abs=1e-3)
