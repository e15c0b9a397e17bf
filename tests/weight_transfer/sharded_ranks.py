"""Run on each rank by test_sharded.py: two ranks, a sharded model, one engine: sharded_ranks MODEL URL DIRECTORY."""

import json
import sys
from pathlib import Path

import anyio
import torch
from transformers import AutoModelForCausalLM

from rollouts.training import distributed
from rollouts.training.backends import FSDPConfig, FSDPTrainingBackend
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weight_transfer.sync import WeightSync
from tests.weight_transfer.sending import IDS, transfer_of


async def work(model: str, url: str, directory: Path) -> dict[str, object]:
    backend = FSDPTrainingBackend(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        lambda sharded: torch.optim.SGD(sharded.parameters(), lr=0.1),
        grpo_loss,
        directory,
        FSDPConfig(mixed_precision=False),
        device="cpu",
    )
    engines = [SGLangEngine(url, timeout_s=60)] if distributed.rank() == 0 else []
    found: dict[str, object] = {}
    for version, kind in enumerate(("tensor", "disk"), start=1):
        sync = WeightSync(backend, engines, transfer_of(kind, backend, directory / "weights"), dtype="float32")
        await sync(version)
        if engines:
            info = await engines[0].model_info()
            found[kind] = [info["weight_version"], await engines[0].input_logprobs(IDS)]
        await sync.aclose()
    return found


if __name__ == "__main__":
    distributed.initialize("cpu", timeout_s=60.0)
    results = anyio.run(work, sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    (Path(sys.argv[3]) / f"rank_{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.shutdown()
