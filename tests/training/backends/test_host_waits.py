"""How often a step makes the host wait for the device, counted on the CPU by the operations that do so on a GPU."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rollouts.training.host_to_device import join, split
from rollouts.training.loops.batching import split_batch
from rollouts.training.loops.rl_loop import prepare_grpo_batch
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import policy_loss, sft_loss
from rollouts.training.types import RLTrainingConfig
from rollouts.training.value_head import ValueHead
from tests.training.backends.test_pytorch import sft_batch
from tests.training.tiny import PAD, rollout_batch, tiny_backend, tiny_model

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select")
_READING = ("tolist", "cpu")


class _Operations(TorchDispatchMode):
    """Names of the operations that a GPU's host waits for; a choice by a mask is one."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in {"index", "index_put", "index_put_"} else []
        if name in _WAITING or any(mask is not None and mask.dtype is torch.bool for mask in masks):
            self.seen.append(name)
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    """Reads of tensors that a CPU does without an operation."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in _READING:
            self.seen.append(name)
        return func(*args, **kwargs or {})


def waits(function: Any, *arguments: Any) -> list[str]:
    seen: list[str] = []
    with _Operations(seen), _Methods(seen):
        function(*arguments)
    return seen


def rl_batches() -> list[dict[str, Any]]:
    batch = rollout_batch(3, 3, seed=1)
    prepared = prepare_grpo_batch(
        batch,
        batch.rewards,
        RLTrainingConfig(num_steps=1, baseline="group_mean"),
        pad_token_id=PAD,
        temperature=0.7,
    )
    return list(split_batch(prepared, rank=0, world_size=1, micro_batch_size=4))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (sft_loss, {}),
    "grpo": (partial(policy_loss, loss="grpo", importance="sequence_mask", entropy_coef=0.01), {}),
    "gspo, reference": (partial(policy_loss, loss="gspo", kl_coef=0.1), {"reference": True}),
    "cispo, sequences": (
        partial(policy_loss, loss="cispo", aggregation="sequence_mean_token_mean"),
        {},
    ),
    "bfloat16": (sft_loss, {"compute_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once(tmp_path, case):
    """Goal: no wait for a micro-batch that is announced, one for one that is not, and one for an optimizer step.

    Red with boolean masks, with a norm or a loss read for each micro-batch, and with sums read one by one.
    """
    loss_fn, options = CASES[case]
    if options.pop("reference", False):
        options["reference"] = as_reference(tiny_model(7), "seven")
    backend = tiny_backend(tmp_path, loss_fn=loss_fn, **options)
    batches = [sft_batch(seed=0), sft_batch(seed=1)] if loss_fn is sft_loss else rl_batches()
    backend._steps.sums.announce(len(batches))
    for batch in batches:
        assert waits(backend._steps.forward_backward, batch) == []
    assert waits(backend._steps.optim_step) == ["tolist"]
    assert waits(backend._steps.forward_backward, batches[0]) == ["tolist"]
    assert waits(backend._steps.optim_step) == ["tolist"]


def test_a_value_head_waits_no_more(tmp_path):
    """Goal: with a value head one wait for each micro-batch's estimates, none to train on it, one for the step.

    Red with the head's gradient clipped by itself (error_if_nonfinite reads its norm).
    """
    backend = tiny_backend(
        tmp_path,
        loss_fn=partial(policy_loss, loss="ppo", value_coef=0.5),
        value_head=ValueHead(16, lr=1e-2),
    )
    batches = rl_batches()
    for batch in batches:
        assert waits(backend._passes.values, batch) == ["cpu"]
        batch["returns"] = torch.ones(batch["input_ids"].shape)
    backend._steps.sums.announce(len(batches))
    for batch in batches:
        assert waits(backend._steps.forward_backward, batch) == []
    # reads its step counts, which lie on the host on a card too
    backend._trained.value_head.optimizer.step = lambda: None
    assert waits(backend._steps.optim_step) == ["tolist"]


def test_what_counts_as_a_wait():
    """Goal: the count sees what it is for. Red with an operation's name left out."""
    mask, values = torch.tensor([True, False]), torch.ones(2)
    assert waits(lambda: values[mask]) == ["index"]
    assert waits(lambda: values.sum().item()) == ["_local_scalar_dense"]
    assert waits(lambda: (mask.nonzero(), values.masked_select(mask))) == [
        "nonzero",
        "masked_select",
    ]
    assert waits(lambda: bool(mask.any())) == ["_local_scalar_dense"]
    assert waits(values.tolist) == ["tolist"]
    assert waits(values.cpu) == ["cpu"]


def test_announced_micro_batches_change_no_number(tmp_path):
    """Goal: the step's metrics and weights are the same bits, announced or not. Red with a sum in float32."""
    found = []
    for announce in (False, True):
        backend = tiny_backend(tmp_path, loss_fn=partial(policy_loss, loss="ppo"))
        steps = []
        for _ in range(3):
            if announce:
                backend.expect(3)
            parts = [backend.forward_backward(batch).wait() for batch in rl_batches()]
            assert announce == (parts == [{}] * len(parts))
            steps.append(backend.optim_step().wait())
        found.append((steps, [parameter.tolist() for parameter in backend.model.parameters()]))
    assert found[0] == found[1]


def test_tensors_travel_as_one():
    """Goal: tensors of any dtype and shape come out of the one buffer as they went in. Red without the alignment."""
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(6).view(2, 3)[:, 1:],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "halves": torch.randn(3, 5, dtype=torch.bfloat16),
        "offsets": torch.tensor([0, 3], dtype=torch.int32),
    }
    buffer, places = join(tensors)
    assert buffer.dtype is torch.uint8 and buffer.ndim == 1
    there = split(buffer.clone(), places)
    assert there.keys() == tensors.keys()
    assert all(
        torch.equal(there[key], tensors[key]) and there[key].dtype == tensors[key].dtype
        for key in tensors
    )
