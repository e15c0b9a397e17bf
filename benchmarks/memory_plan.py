"""The memory plan beside torch's own tracker, for the training step of every shipped GPU config.

    python -m benchmarks.memory_plan [--layers 4] [--compiled]

Our backend, losses and head, and transformers' model, run two steps on fake tensors: nothing is computed or allocated,
and `torch.distributed._tools.mem_tracker.MemTracker` counts what would be. Fake CUDA tensors need a torch with CUDA, so
these are the CPU's, with what our code asks of a device answered as a card would: copies in bfloat16, the
variable-length kernel, the output head compiled. Printed: the plan's tensors and the tracker's at the peak, in GiB.
`--compiled` prints instead what a small model saves under torch.compile, by token and layer, beside the plan.
"""

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor

from rollouts.config import Config, load_config
from rollouts.remote.inputs.shapes import HUB, Shape, shape_of
from rollouts.remote.plan.memory.engine_memory import Card
from rollouts.remote.plan.memory.training_memory import StepLoad, layer_activations, training_peaks
from rollouts.remote.plan.memory.uses import step_of
from rollouts.training import (
    distributed,
    forward,
    head_ways,
    lora,
    optim,
    packed_attention,
    reference,
)
from rollouts.training.backends import optimizer_steps, precision, sharded, step_sums
from rollouts.training.checkpoint import Retention
from rollouts.training.loops.batching import collate
from rollouts.worker.builders.backend import build_backend

ROOT = Path(__file__).resolve().parent.parent
GPU_CONFIGS = ("01_debug_sft_rl", "nanochat_sft_rl", "rl_math", "sft_openwebtext", "sft_qwen")
GIB = 2**30
CARD = Card(have=40 * GIB, total=40 * GIB)
DOCUMENT = 512  # tokens of each; in RL the half of them are its prompt's, which no other shares


class NoModules:
    """In place of the tracker's tracker of modules: sums by module are not asked for, and cost most of its time."""

    is_bw = False
    parents: frozenset[str] = frozenset()

    def register_user_hooks(self, *hooks: Any) -> None: ...
    def clear_user_hooks(self) -> None: ...
    def __enter__(self) -> "NoModules":
        return self

    def __exit__(self, *error: object) -> None: ...


class Tracker(MemTracker):
    """Torch's tracker, with the peak since `start_over`."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = NoModules()

    @property
    def peak(self) -> int:
        return sum(snapshot["Total"] for snapshot in self.get_tracker_snapshot("peak").values())

    def start_over(self) -> None:
        self._peak_mem.clear()
        self._peak_mem_snap.clear()


class CompiledHead:
    """In place of the head's compiled part: no more than its results is in memory."""

    works = True

    def __call__(self, function: Any, logits_nV: Tensor, *others: Any) -> Any:
        if function is head_ways.logits_gradient:
            return torch.empty_like(logits_nV)
        log_probs_n = torch.empty(len(logits_nV))
        return log_probs_n, torch.empty(len(logits_nV)) if others[2] else None


def fake_batches(mode: FakeTensorMode) -> Any:
    """`forward.lay_out`, which decides on the host from real numbers, with fake tensors as its result."""
    real = forward.lay_out

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        if isinstance(value, packed_attention.Documents):
            parts = {name: fake(getattr(value, name)) for name in ("offsets", "copies", "firsts")}
            return dataclasses.replace(value, **parts)
        return (
            type(value)(*map(fake, value))
            if isinstance(value, tuple) and hasattr(value, "_fields")
            else value
        )

    def lay_out(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            layout, inputs = real(*arguments, **options)
        return fake(layout), {key: fake(value) for key, value in inputs.items()}

    return lay_out


@contextlib.contextmanager
def as_on_a_card(mode: FakeTensorMode, card_bytes: int, ranks: int) -> Iterator[None]:
    """Answer what our code asks of its device, and of other ranks, as a card and a process group would."""
    chunk = head_ways.cuda_chunk_elements(card_bytes, compiled=True)
    mesh, defers = sharded._mesh, sharded.defers_reduction

    def real_mesh(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return mesh(*arguments)

    answers: list[tuple[Any, str, Any]] = [
        (nn.Module, "_apply", lambda self, fn, recurse=True: self),  # all is where it belongs
        (precision, "use_copies", lambda device: True),
        (step_sums.StepSums, "_read", lambda self, norms, sums: [1.0] * (len(norms) + len(sums))),
        (packed_attention, "has_kernel", lambda device: True),
        (head_ways, "fused_on", lambda kind: CompiledHead()),
        (head_ways, "has_wide_products", lambda device: True),
        (head_ways, "chunk_elements", lambda device, on_cpu: chunk),
        (forward, "lay_out", fake_batches(mode)),
        (optim, "_together", lambda parameter: not isinstance(parameter, DTensor)),
        (reference, "weights_sha256", lambda model: ""),
        (lora, "weights_sha256", lambda model: ""),
        (sharded, "_mesh", real_mesh),
        (sharded, "defers_reduction", lambda count, device_bytes: defers(count, card_bytes)),
        (distributed, "broadcast_tensors", lambda tensors: None),
        (distributed, "all_reduce_floats", list),
        (distributed, "new_group", lambda: None),
    ]
    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        answers.append((optimizer_steps, "_total_norm", lambda gradients: torch.ones(())))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, answer in answers:
                stack.enter_context(mock.patch.object(owner, name, answer))
            yield
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def batch_of(tokens: int, *, rl: bool) -> dict[str, Any]:
    """One micro-batch of so many tokens."""
    count, prompt = max(1, tokens // DOCUMENT), DOCUMENT // 2 if rl else 0
    rows = [[row % 1000] * DOCUMENT for row in range(count)]
    batch = collate(rows, [[0.0] * prompt + [1.0] * (DOCUMENT - prompt)] * count, pad_token_id=0)
    if rl:
        more = {"advantages": torch.ones(count), "old_log_probs": torch.zeros(count, DOCUMENT)}
        batch |= {**more, "temperature": 1.0, "sequences_global": float(count)}
    return batch


def tracked(
    config: Config, stage: str, model: Mapping[str, Any], *, card: Card = CARD
) -> tuple[int, int]:
    """Bytes at the peak of a micro-batch that adds to a gradient, and of the optimizer's step, by the tracker.

    `config` as it is, with the model that `model`, a config.json, describes.
    """
    assert card.total is not None
    step = step_of(config, stage, shape_of(model), card)
    batch = batch_of(step.tokens, rl=stage == "rl")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(model))
        here = dataclasses.replace(
            config, model=dataclasses.replace(config.model, name=directory, init="random")
        )
        with as_on_a_card(mode, card.total, len(config.target.gpu_ranks)), mode:
            backend = build_backend(
                here,
                stage,
                checkpoint_dir=Path(directory),
                model_path=directory,
                tokenizer=None,
                device=torch.device("cpu"),
                num_steps=2,
                reference=None,
                retention=Retention(),
            )
            return _peaks(backend, batch)


def _peaks(backend: Any, batch: Mapping[str, Any]) -> tuple[int, int]:
    tracker = Tracker()
    copies = backend._trained.precision.copies
    tracker.track_external(backend.model, backend.optimizer, *(copies._copies if copies else ()))
    with tracker:
        backend._steps.sums.micro_batches = 1
        backend._steps.optim_step()  # on gradients of 0: makes the state
        tracker.start_over()
        backend._steps.sums.announce(2)
        for _ in range(2):
            backend._steps.forward_backward(batch)
        training = tracker.peak
        tracker.start_over()
        backend._steps.optim_step()
        return training, tracker.peak


def planned(
    config: Config, stage: str, model: Mapping[str, Any], *, card: Card = CARD
) -> tuple[int, int]:
    """Likewise by the plan: tensors alone, without what the allocator and CUDA take."""
    shape = shape_of(model)
    peaks = {
        name: sum(parts.values())
        for name, parts in training_peaks(shape, _drawn(config, stage, shape, card)).items()
    }
    optimizer = peaks.pop("optimizer step")
    return max(peaks.values()), optimizer


def _drawn(config: Config, stage: str, shape: Shape, card: Card) -> StepLoad:
    """The step of `batch_of`: in RL its prompts are not trained."""
    step = step_of(config, stage, shape, card)
    return dataclasses.replace(step, trained=step.tokens // 2) if stage == "rl" else step


def stages() -> Iterator[tuple[str, Config, str]]:
    """The training stages of the shipped GPU configs."""
    for name in GPU_CONFIGS:
        config = load_config(ROOT / "configs" / f"{name}.py")
        for stage in config.stages:
            yield name, config, stage


def saved_under_compile(kind: str, layers: int) -> tuple[float, float]:
    """Bytes a token that a small real model saves when it is compiled, and that the plan has for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.flash_stand_in import flash_on_cpu

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 344,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    fields = {**sizes, "num_hidden_layers": layers, "vocab_size": 256, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).to(
        torch.bfloat16
    )
    forward.prepare(model)
    torch.compiler.reset()
    forward.body(model).compile(dynamic=True, backend="aot_eager_decomp_partition")
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.ones(4, 128, dtype=torch.int64)
    with flash_on_cpu(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward.hidden_states(model, forward.pack(ids, None))
    step = dataclasses.replace(
        step_of(*_any_step(), CARD), tokens=1, attended=1, trained=1, compiled=True
    )
    plan = layer_activations(shape_of({"model_type": kind, **fields}), step)
    return sum(size for size, _ in saved.values()) / len(kept), plan


def _any_step() -> tuple[Config, str, Shape]:
    config = load_config(ROOT / "configs" / "sft_openwebtext.py")
    return config, "sft", shape_of(HUB[config.model.name])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="of each model, in place of its own number"
    )
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if options.compiled:
        for kind in ("qwen2", "qwen3"):
            (one, plan), (three, _) = (saved_under_compile(kind, layers) for layers in (1, 3))
            print(
                f"{kind}: {(three - one) / 2:.0f} bytes a token and layer, the plan has {plan:.0f}"
            )
        return
    print(f"{'config':20}{'stage':7}{'peak':12}{'plan':>8}{'tracker':>9}{'ratio':>7}{'seconds':>9}")
    for name, config, stage in stages():
        model = dict(HUB[config.model.name])
        model |= {"num_hidden_layers": options.layers} if options.layers else {}
        started = time.monotonic()
        found, plan = tracked(config, stage, model), planned(config, stage, model)
        seconds = time.monotonic() - started
        for which, ours, theirs in zip(("training", "optimizer"), plan, found, strict=True):
            if which == "optimizer" and config.target.sharding != "none":
                continue  # torch works out a sharded operation's result on whole tensors, and the tracker counts those
            line = f"{name:20}{stage:7}{which:12}{ours / GIB:8.2f}{theirs / GIB:9.2f}{ours / theirs:7.3f}"
            print(f"{line}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
