"""A training step of the real backend on fake tensors, on the branches that a card takes, with its counts.

Fake tensors have shapes and no memory, so that any model fits here. Matrix products of fake CUDA tensors need a build
of torch for CUDA; these are CPU tensors, and what asks for the device is told that it is a card.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from benchmarks import fusion
from benchmarks.counting import OTHER, Counts, Kernel, nbytes
from rollouts.training import distributed, forward, head_ways, log_probs, packed_attention
from rollouts.training.backends import precision
from rollouts.training.backends.placement import WholeCopy
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.compiled_layers import compile_layers
from rollouts.training.loops.batching import collate
from rollouts.training.loops.rl_loop import prepare_grpo_batch
from rollouts.training.optim import build_optimizer
from rollouts.training.rl_losses import policy_loss, sft_loss, trained_tokens
from rollouts.training.types import RLTrainingConfig, RolloutBatch, Sample

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """A micro-batch: documents of equal length. RL: `samples` a prompt, which takes `prompt_tokens` of each."""

    tokens: int = 8192
    document: int = 1024
    kind: str = "sft"
    prompt_tokens: int = 128
    samples: int = 8

    @property
    def trained(self) -> int:
        """Tokens that the output head runs on."""
        own = self.document - 1 if self.kind == "sft" else self.document - self.prompt_tokens
        return self.tokens // self.document * own


@dataclass(frozen=True)
class StepCounts:
    """What a micro-batch takes, and an optimizer step beside. `graphs` were compiled, with so many `breaks`."""

    micro_batch: Counts
    optimizer: Counts
    graphs: tuple[str, ...] = ()
    breaks: int = 0


class OnePass:
    """The head's compiled part as counts see it: logits read three times (maximum, sum, result), results written."""

    works = True

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def __call__(self, function: Callable[..., Any], logits_nV: Tensor, *others: Any) -> Any:
        with self._counts.pause():
            out = function(logits_nV, *others)
        results = [
            tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor is not None
        ]
        moved = 3 * nbytes(logits_nV) + sum(map(nbytes, results))
        self._counts.kernels.append(Kernel(self._counts.part, OTHER, function.__name__, moved))
        return out


@contextmanager
def as_on_a_card(
    counts: Counts, mode: FakeTensorMode, *, memory_bytes: int, compiled_head: bool
) -> Iterator[None]:
    """Have a backend on fake tensors take a card's branches. What it copies to its device becomes fake."""
    own_layout = forward.lay_out

    def lay_out(*arguments: Any, **options: Any) -> Any:
        layout, tensors = own_layout(*arguments, **options)
        assert layout.packed is not None
        counts.lengths = layout.packed.documents.lengths
        return layout, tensors

    def to_fake(tensors: Mapping[Any, Tensor], device: torch.device) -> dict[Any, Tensor]:
        return {key: mode.from_tensor(tensor) for key, tensor in tensors.items()}

    def in_head(function: Callable[..., Any]) -> Any:
        def run(*arguments: Any) -> Any:
            with counts.of("head"):
                return function(*arguments)

        return staticmethod(run)

    head = log_probs._SelectedLogProbs
    chunk = head_ways.cuda_chunk_elements(memory_bytes, compiled_head)
    stand_ins: list[tuple[Any, str, Any]] = [
        (packed_attention, "has_kernel", lambda device: True),
        (precision, "use_copies", lambda device: True),
        (head_ways, "has_wide_products", lambda device: True),
        (head_ways, "chunk_elements", lambda device, on_cpu: chunk),
        (head_ways, "fused_on", lambda kind: OnePass(counts) if compiled_head else None),
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True),
        (forward, "to_device", to_fake),
        (forward, "lay_out", lay_out),
        (head, "forward", in_head(head.forward)),
        (head, "backward", in_head(head.backward)),
    ]
    with ExitStack() as stack:
        for place, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(place, name, stand_in))
        yield


class _InPlace(WholeCopy):
    """A model that stays where it is: fake parameters cannot be moved."""

    def place(self, model: nn.Module) -> None:
        pass


def count_step(
    config: Any,
    work: Work,
    *,
    memory_gib: float = 141,
    compiled: bool = True,
    compiled_head: bool | None = None,
    checkpointing: bool = False,
    ranks: int = 1,
) -> StepCounts:
    """The counts of a step's second micro-batch, and of what comes once a step.

    A micro-batch goes before where something is compiled. `config` is a transformers config, `memory_gib` the card's,
    which says how large the head's chunks are. `compiled_head`: None: as the rest. `ranks`: whole copies of the model.
    """
    counts, graphs = Counts(), list[str]()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    compiled_head = compiled if compiled_head is None else compiled_head
    card = as_on_a_card(
        counts, mode, memory_bytes=int(memory_gib * GIB), compiled_head=compiled_head
    )
    with card, _fake_ranks(ranks), torch.random.fork_rng():
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(model, backend=fusion.compiler(counts, graphs))
        backend = make_backend(model, work)
        batch = make_batch(work, config.vocab_size)
        _make_state(backend.optimizer)
        backend._steps.sums.announce(3 if compiled else 2)
        with counts.counting():
            if compiled:
                backend._steps.forward_backward(batch)
            backend._steps.forward_backward(batch)
            counts.start_over()
            backend._steps.forward_backward(batch)
            micro_batch = counts.taken()
            with counts.of("optimizer"):
                backend._steps.optim_step()
                with backend._trained.precision.copies.in_place():  # type: ignore[union-attr] — made again once a step
                    pass
    breaks = torch._dynamo.utils.counters["graph_break"] if compiled else {}
    return StepCounts(micro_batch, counts, tuple(graphs), sum(breaks.values()))


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer's state, as after a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _fake_ranks(ranks: int) -> Iterator[None]:
    """A process group of so many ranks, of which only this one is there: collectives return at once."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with mock.patch.object(distributed, "new_group", lambda: None):
            yield
    finally:
        dist.destroy_process_group()


def make_backend(model: nn.Module, work: Work) -> PyTorchTrainingBackend:
    rates = {"matrix_lr": 1e-4, "embedding_lr": 1e-4, "unembedding_lr": 1e-4}
    loss = (
        sft_loss
        if work.kind == "sft"
        else partial(policy_loss, loss="grpo", importance="token_truncate")
    )
    return PyTorchTrainingBackend(
        model=model,
        optimizer=build_optimizer(
            model, **rates, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8
        ),
        loss_fn=loss,
        checkpoint_dir=Path("unused"),
        compute_dtype="bfloat16",
        placement=_InPlace(torch.device("cpu")),
    )


def make_batch(work: Work, vocabulary: int) -> dict[str, Any]:
    """One micro-batch that is the whole step, made as the loops make theirs."""
    count = work.tokens // work.document
    rows = [
        [(7 * row + place) % vocabulary for place in range(work.document)] for row in range(count)
    ]
    if work.kind == "sft":
        batch = collate(rows, [[1.0] * work.document] * count, pad_token_id=0)
        return {**batch, "tokens_global": trained_tokens(batch["loss_mask"])}
    prompt, response = work.prompt_tokens, work.document - work.prompt_tokens
    masks = [[0.0] * prompt + [1.0] * response] * count
    rows = [rows[row // work.samples][:prompt] + rows[row][prompt:] for row in range(count)]
    log_probs_of = {"rollout_log_probs": [-1.0] * response, "response_length": response}
    samples = [
        Sample("p", tokens=row, loss_mask=mask, reward=float(i % 2), **log_probs_of)
        for i, (row, mask) in enumerate(zip(rows, masks, strict=True))
    ]
    rewards = [float(row % 2) for row in range(count)]
    groups = [row // work.samples for row in range(count)]
    rollouts = RolloutBatch(
        rows, masks, rewards, [response] * count, samples=samples, group_ids=groups
    )
    settings = RLTrainingConfig(num_steps=1, baseline="group_mean")
    return prepare_grpo_batch(rollouts, rewards, settings, pad_token_id=0, temperature=1.0)
