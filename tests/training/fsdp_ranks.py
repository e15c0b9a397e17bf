"""Run on each rank by backends/test_fsdp.py: the same work by sharded backends, or by one plain rank to compare."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor

from rollouts.training import distributed
from rollouts.training.backends import FSDPConfig, FSDPTrainingBackend, PyTorchTrainingBackend
from rollouts.training.backends.pytorch import PyTorchTrainingBackend as Backend
from rollouts.training.compiled_layers import compile_layers, layers_of
from rollouts.training.loops import run_rl_training, run_sft_training, validation_loss
from rollouts.training.loops.train_step import train_step
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.metrics import JSONLLogger
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import policy_loss, sft_loss
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig
from tests.training.backends.test_pytorch import sft_batch
from tests.training.tiny import PAD, sft_samples, tiny_model, tiny_tokenizer
from tests.training.two_ranks import Buffer, Manager

EXACT = FSDPConfig(sharding_strategy="FULL_SHARD", mixed_precision=False)
PARTS = {
    "loss": "gspo",
    "aggregation": "sequence_mean_token_mean",
    "kl_coef": 0.1,
    "entropy_coef": 0.01,
}
STRATEGIES = {
    "full": EXACT,
    "grad_op": FSDPConfig(sharding_strategy="SHARD_GRAD_OP", mixed_precision=False),
    "none": FSDPConfig(sharding_strategy="NO_SHARD", mixed_precision=False),
    "offload": FSDPConfig(cpu_offload=True, mixed_precision=False),
    "recompute": FSDPConfig(gradient_checkpointing=True, mixed_precision=False),
}
HYBRID = FSDPConfig(sharding_strategy="HYBRID_SHARD", mixed_precision=False, shard_group_size=2)
Make = Callable[..., Backend]


def model_of(seed: int) -> Any:
    """25 vocabulary entries, which two ranks share unevenly; the output head is tied to them."""
    model = tiny_model(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(25)
    return model


def adapted(init_seed: int) -> Any:
    """The model of seed 0, frozen, with adapters."""
    settings = LoraSettings(
        rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", init_seed=init_seed
    )
    return apply_lora(model_of(0), settings, base_name="seed 0")


def logits_loss(
    logits: torch.Tensor, labels: Any, loss_mask: Any, tokens_global: float
) -> torch.Tensor:
    """A user's own loss, which gets the logits of a padded batch."""
    assert logits.ndim == 3
    return sft_loss(logits, labels, loss_mask, tokens_global=tokens_global)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def sharded(
    directory: Path,
    *,
    config: FSDPConfig = EXACT,
    seed: int = 0,
    model: Any = None,
    loss_fn: Any = sft_loss,
    **options: Any,
) -> Any:
    model = model or model_of(seed + 5 * distributed.rank())  # rank 0's parameters must win
    options = {
        "loss_fn": loss_fn,
        "checkpoint_dir": directory,
        "tokenizer": tiny_tokenizer(),
        **options,
    }
    return FSDPTrainingBackend(
        model=model, optimizer_fn=adamw, config=config, device="cpu", **options
    )


def plain(
    directory: Path,
    *,
    config: Any = None,
    seed: int = 0,
    model: Any = None,
    loss_fn: Any = sft_loss,
    **options: Any,
) -> Backend:
    model = model or model_of(seed)
    return PyTorchTrainingBackend(
        model, adamw(model), loss_fn, directory, tokenizer=tiny_tokenizer(), **options
    )


async def sft(backend: Backend, num_steps: int = 3, resume: dict | None = None) -> list[dict]:
    """7 sequences a step in micro-batches of 2: two and two for two ranks, and a validation of 3 batches."""
    config = SFTTrainingConfig(num_steps=num_steps, batch_size=7, log_every=1, micro_batch_size=2)

    async def validate(step: int) -> dict:
        return await validation_loss(
            backend, sft_samples(5, seed=1), batch_size=2, pad_token_id=PAD
        )

    options = {"pad_token_id": PAD, "resume": resume, "eval_fn": validate, "eval_every": 1}
    return await run_sft_training(backend, sft_samples(10), config, **options)


async def uneven(backend: Backend) -> list[dict]:
    """3 sequences, one by one, then 1, then by tokens: a rank has fewer micro-batches than the other, or none."""
    found = [await train_step(backend, sft_batch(count), 1) for count in (3, 1)]
    return [*found, await train_step(backend, sft_batch(5), None, 13)]


async def rl(make: Make, directory: Path) -> list[dict]:
    """Two steps, a checkpoint, two more by another backend; every part of the loss, with a reference model."""
    found = []
    for num_steps in (2, 4):
        reference = as_reference(model_of(3), "seed 3")
        backend = make(
            directory,
            seed=num_steps,
            loss_fn=partial(policy_loss, **PARTS),
            reference=reference,
            max_grad_norm=0.05,
        )
        state = await backend.load_checkpoint(directory / "latest") if num_steps == 4 else None
        buffer = Buffer() if distributed.rank() == 0 else None
        options = {"baseline": "group_mean", "advantage_norm": "group_std", "micro_batch_size": 2}
        config = RLTrainingConfig(num_steps=num_steps, **options)
        manager = Manager(buffer) if buffer else None
        log = JSONLLogger(directory / "rollouts.jsonl") if buffer else None
        found += await run_rl_training(
            backend,
            buffer,
            manager,
            [],
            config,
            pad_token_id=PAD,
            resume=state,
            rollouts_logger=log,
        )
    return found


async def lora(make: Make, directory: Path) -> list[dict]:
    """Adapters alone for three steps, and two more by a backend whose adapters began elsewhere."""
    found = await sft(make(directory, model=adapted(0)))
    backend = make(directory, model=adapted(1))
    return found + await sft(backend, 5, await backend.load_checkpoint(directory / "latest"))


async def resume_plain(make: Make, directory: Path) -> list[dict]:
    """Go on from what a plain run on one rank saved in `directory`/"from_one" after 3 steps."""
    backend = make(directory / "resumed", seed=8)
    state = await backend.load_checkpoint(directory / "from_one" / "latest")
    return await sft(backend, num_steps=5, resume=state)


async def exact_resume(directory: Path) -> list[list[dict]]:
    """Five steps at a stretch, and the last two of them from the checkpoint of "full" after three."""
    at_a_stretch = await sft(sharded(directory / "stretch"), num_steps=5)
    backend = sharded(directory / "again", seed=4)
    return [
        at_a_stretch[3:],
        await sft(backend, 5, await backend.load_checkpoint(directory / "full" / "latest")),
    ]


def facts(backend: Backend) -> dict:
    """What a rank holds: the share of the parameters, and the dtypes of parameters and of the optimizer's state."""
    parameters = list(backend.model.parameters())
    states = [
        value
        for entries in backend.optimizer.state.values()
        for key, value in entries.items()
        if key != "step"
    ]
    local = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
    return {
        "share": local / sum(p.numel() for p in parameters),
        "dtypes": sorted({str(tensor.dtype) for tensor in [*parameters, *states]}),
        "sharded_state": all(isinstance(state, DTensor) for state in states),
    }


def watched(model: Any) -> dict[str, Any]:
    """Filled while `model` runs: how often its first layer did, and whether that was freed when the last norm ran."""
    seen = {"layer_runs": 0, "freed": False}
    first = model.model.layers[0].mlp

    def count(*hook: Any) -> None:
        seen["layer_runs"] += 1

    def look(*hook: Any) -> None:
        seen["freed"] = isinstance(first.up_proj.weight, DTensor)

    # a second pass may stop inside, once it has what backward needs
    first.register_forward_pre_hook(count)
    model.model.norm.register_forward_hook(look)
    return seen


async def mixed(directory: Path) -> dict:
    backend = sharded(directory, config=FSDPConfig())
    seen: dict[str, str] = {}
    backend.model.model.layers[0].mlp.register_forward_hook(
        lambda *hook: seen.update(hidden=str(hook[2].dtype))
    )
    return {"metrics": await sft(backend), **facts(backend), **seen}


def work(make: Make, directory: Path, names: dict[str, FSDPConfig]) -> dict:
    results = {}
    for name, config in names.items():
        backend = make(directory / name, config=config)
        seen = watched(backend.model)
        results[name] = anyio.run(sft, backend)
        anyio.run(backend.save_weights, directory / name / "weights")
        if isinstance(backend, FSDPTrainingBackend):
            results[f"{name} facts"] = {**facts(backend), **seen}
    return results


def counted(directory: Path) -> dict:
    """How often gradients are reduced in three steps of two micro-batches, and the steps' metrics."""
    calls = {
        name: 0
        for name in ("reduce_scatter_single", "reduce_scatter_tensor")
        if hasattr(dist, name)
    }

    def count(name: str) -> Callable[..., Any]:
        own = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return own(*arguments, **options)

        setattr(dist, name, call)
        return own

    backend = sharded(directory)
    owns = {name: count(name) for name in calls}
    metrics = anyio.run(sft, backend)
    for name, own in owns.items():
        setattr(dist, name, own)
    return {"reductions": sum(calls.values()), "metrics": metrics}


def compiled(directory: Path) -> dict:
    """Three steps of compiled layers, whose activations are computed again, and what was compiled."""
    counter = CompileCounter()
    model = model_of(5 * distributed.rank())
    layers = layers_of(model)  # sharding renames their class
    compile_layers(model, backend=counter)
    metrics = anyio.run(sft, sharded(directory, config=STRATEGIES["recompute"], model=model))
    works = [layer.forward._code.works for layer in layers]
    return {"metrics": metrics, "compilations": counter.frame_count, "works": works}


def gathered_ahead(directory: Path, config: FSDPConfig) -> list[int]:
    """How many gathers a backward pass has begun when the MLP of each layer has its turn: last layer first."""
    names = [
        name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)
    ]
    begun, seen = [0], []
    backend = sharded(directory, config=config)

    def gather(own: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begun[0] += 1
        return own(*arguments, **options)

    def turn(*hook: Any) -> None:
        seen.append(begun[0])

    for layer in backend.model.model.layers:
        layer.mlp.register_full_backward_pre_hook(turn)
    backend.model.model.norm.register_forward_hook(lambda *hook: begun.__setitem__(0, 0))
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(dist, name, partial(gather, getattr(dist, name))))
        backend.forward_backward({**sft_batch(), "tokens_global": 10.0}).wait()
    return seen


def main(directory: Path) -> None:
    distributed.initialize("cpu", timeout_s=60.0)
    if distributed.world_size() == 4:
        results = work(sharded, directory, {"hybrid": HYBRID})
    else:
        results = work(sharded, directory, STRATEGIES)
        results["logits"] = anyio.run(sft, sharded(directory / "logits", loss_fn=logits_loss))
        results["compiled"] = compiled(directory / "compiled")
        results["counted"] = counted(directory / "counted")
        for name in ("full", "recompute"):
            results[f"{name} gathered"] = gathered_ahead(directory / "gathered", STRATEGIES[name])
        results["exact"] = anyio.run(exact_resume, directory)
        results["uneven"] = anyio.run(uneven, sharded(directory / "uneven"))
        results["lora"] = anyio.run(lora, sharded, directory / "lora")
        results["rl"] = anyio.run(rl, sharded, directory / "rl")
        results["resumed"] = anyio.run(resume_plain, sharded, directory)
        results["mixed"] = anyio.run(mixed, directory / "mixed")
    (directory / f"rank_{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
