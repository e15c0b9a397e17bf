"""A step of the 0.6B shape on fake tensors, as on a card: what was counted stays, and the arithmetic from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import cards, fusion
from benchmarks.counting import Counts, Kernel, nbytes
from benchmarks.fake_step import StepCounts, Work, count_step
from benchmarks.gpu_sft import qwen3_600m
from benchmarks.step_counts import device_s, grouped, main, model_flops
from rollouts.training.flops import flops_per_token

LAYERS, DOCUMENTS = 2, 8
HEAD = 151_936 * 1024  # elements
GB = 1e9


def shape(layers: int) -> Any:
    config = qwen3_600m()
    config.num_hidden_layers = layers
    return config


@pytest.fixture(scope="module")
def sft() -> StepCounts:
    """Two layers, step by step, the head's parts compiled; on two ranks."""
    return count_step(shape(LAYERS), Work(), compiled=False, compiled_head=True, ranks=2)


@pytest.fixture(scope="module")
def rl() -> StepCounts:
    return count_step(shape(1), Work(kind="rl"), compiled=False, compiled_head=True)


def moved(counts: Counts, part: str) -> float:
    return sum(kernel.bytes for kernel in counts.kernels if kernel.part == part)


def test_the_host_waits_once_a_step(sft: StepCounts, rl: StepCounts) -> None:
    """Goal: no wait for a micro-batch, one for an optimizer step, SFT and GRPO. Red with a loss read by itself."""
    for found in (sft, rl):
        assert found.micro_batch.waits == [] and found.optimizer.waits == ["tolist"]


def test_products_are_the_models_and_no_more(sft: StepCounts) -> None:
    """Goal: SFT's products are those that the model needs, once. Red with the head's logits computed twice."""
    products = [k for k in sft.micro_batch.kernels if k.kind == "product"]
    needed = model_flops(shape(LAYERS), Work(), full_attention=False)
    attention = 8192 * (flops_per_token(shape(LAYERS), 1024) - flops_per_token(shape(LAYERS), 0))
    assert sum(kernel.flops for kernel in products) == pytest.approx(needed - attention, rel=1e-6)


def test_attention_is_one_kernel_a_layer(sft: StepCounts) -> None:
    """Goal: one kernel forward and one backward, over documents by themselves. Red with the kernel's branch off."""
    kernels = [k for k in sft.micro_batch.kernels if k.kind == "attention"]
    assert len(kernels) == 2 * LAYERS
    scores = DOCUMENTS * 1024 * 1024 / 2
    assert sum(kernel.flops for kernel in kernels) == LAYERS * (2 + 5) * 2 * scores * 16 * 128


@pytest.mark.parametrize(("kind", "most_GB"), [("sft", 46), ("rl", 46)])
def test_bytes_of_the_head(sft: StepCounts, rl: StepCounts, kind: str, most_GB: int) -> None:
    """Goal: the head of a micro-batch of 8,192 tokens moves no more. Red with chunks of 2^24: 167 GB."""
    assert moved({"sft": sft, "rl": rl}[kind].micro_batch, "head") <= most_GB * GB


def test_kernels_and_bytes_of_a_layer(sft: StepCounts, rl: StepCounts) -> None:
    """Goal: what one more layer takes, step by step: no more kernels and bytes than counted. Red with a cast added."""
    one = count_step(shape(LAYERS - 1), Work(), compiled=False, compiled_head=True)
    kernels = [sum(k.launches for k in found.micro_batch.kernels) for found in (one, sft)]
    assert kernels[1] - kernels[0] <= 175
    assert moved(sft.micro_batch, "blocks") - moved(one.micro_batch, "blocks") <= 9.8 * GB


def test_an_optimizer_step_reads_and_writes_so_often(sft: StepCounts) -> None:
    """Goal: AdamW 28 bytes a parameter, the norm 4, clipping 8, copies in bfloat16 6; each few launches for them all.

    And the sum over ranks is one collective for many gradients. Red with foreach in place of fused.
    """
    parameters = HEAD + LAYERS * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072)
    names = {"_fused_adamw_": 28, "_foreach_norm": 4, "_foreach_mul_": 8, "_foreach_copy_": 6}
    for name, per_parameter in names.items():
        kernels = [k for k in sft.optimizer.kernels if k.name == name]
        assert sum(k.bytes for k in kernels) == pytest.approx(
            per_parameter * parameters, rel=0.01
        ), name
        assert sum(k.launches for k in kernels) <= 15
    assert sft.micro_batch.collectives.total() == 0
    # buckets of 2^25 elements; the embedding is larger than one
    assert sft.optimizer.collectives == {"allreduce_": 3}


def kernels_of(function: Callable[..., Any], *inputs: Tensor) -> dict[str, int]:
    """Bytes of the elementwise kernels of a graph, by the operations that they hold."""
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    plan = fusion.Plan(graph)
    made = {
        node: node.meta["val"]
        for node in graph.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    }
    plan.work = {node: ("product", 0) for node in made if plan.is_extern(node)}
    sizes = {node: 0 if plan.is_constant(node) else nbytes(value) for node, value in made.items()}
    return {
        kernel.name: kernel.bytes
        for kernel in plan.kernels(sizes, "blocks")
        if kernel.kind != "product"
    }


def test_what_is_elementwise_between_products_is_one_kernel() -> None:
    """Goal: a norm before a product is one kernel, input read once; so is its gradient after one, and the sum over
    tokens is a kernel beside it, which reads what that one read. Red with a node made as early as can be.
    """

    def forward(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (
            (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * gain
        ) @ weight

    def backward(
        x: Tensor, gain: Tensor, weight: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide, back = x.float(), gradient @ weight.t()
        return back * gain + wide.bfloat16(), (back * wide).sum(0)

    mode = FakeTensorMode()
    with mode:
        x, gradient = (torch.empty(64, 32, dtype=torch.bfloat16) for _ in range(2))
        gain, weight = (
            torch.empty(32, dtype=torch.bfloat16),
            torch.empty(32, 32, dtype=torch.bfloat16),
        )
        ahead, back = (
            kernels_of(forward, x, gain, weight),
            kernels_of(backward, x, gain, weight, gradient),
        )
    row, vector = 64 * 32 * 2, 32 * 2
    assert list(ahead.values()) == [row + vector + row]
    assert back.pop("sum") == row + row + 2 * vector
    assert list(back.values()) == [row + row + vector + row]


def test_the_arithmetic_by_hand() -> None:
    """Goal: a kernel takes its memory's time or its arithmetic's, whichever is more. Red with their sum."""
    card = cards.Card(
        stated=1000e12,
        measured=800e12,
        is_measured=True,
        bandwidth=4e12,
        attention=300e12,
        memory_gib=80,
    )
    assert cards.kernel_s(card, "elementwise", 3.24e9, 0) == pytest.approx(1e-3)
    assert cards.kernel_s(card, "product", 3.24e9, 0.624e12) == pytest.approx(1e-3)
    assert cards.kernel_s(card, "product", 0, 0.8e12, best_products=True) == pytest.approx(1e-3)
    assert cards.kernel_s(card, "attention", 0, 0.3e12) == pytest.approx(1e-3)
    counts = Counts()
    counts.kernels = [
        Kernel("blocks", "product", "mm", 0, int(0.624e12)),
        Kernel("head", "elementwise", "mul", 324, 0),
    ]
    optimizer = Counts()
    optimizer.kernels = [Kernel("optimizer", "elementwise", "mul", int(12.96e9), 0)]
    assert device_s(card, StepCounts(counts, optimizer), 4) == pytest.approx(2e-3, rel=1e-3)
    assert list(grouped(counts)) == [("blocks", "product"), ("head", "elementwise")]
    assert cards.mfu(500e12, 1.0, card.stated) == 0.5


def test_model_flops_of_the_whole_shape() -> None:
    """Goal: 32.2 TFLOP for 8,192 tokens in documents of 1,024, 35.1 with attention in full. Red with a wrong length."""
    work = Work(document=1024)
    causal, full = (
        model_flops(qwen3_600m(), work, full_attention=way) / 1e12 for way in (False, True)
    )
    assert (round(causal, 1), round(full, 1)) == (32.2, 35.1)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Goal: counts, every card and the terms of one, from a call with the fewest words. Red with a card left out."""
    main(["--layers", "1", "--eager", "--tokens", "2048", "--card", "L40S"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("4090", "L40S", "A100", "H100", "H200", "B200"))
    assert all(words in printed for words in ("graph breaks: 0", "collectives: 0", "goes on L40S"))
