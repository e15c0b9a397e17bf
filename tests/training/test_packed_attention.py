"""Packed attention on a card, by a stand-in for CUDA's kernel: which calls reach it, their numbers, and compilation."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM

from rollouts.training import forward, packed_attention
from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.model_loading import enable_activation_checkpointing
from rollouts.training.packed_attention import Documents
from rollouts.training.rl_losses import sft_loss
from tests.flash_stand_in import Calls, flash_on_cpu
from tests.training.test_forward import OPTIONS, SMALL, batch_of

LAYERS = 2
CPU = torch.device("cpu")


def model_of(kind: str) -> nn.Module:
    """A float32 model of `kind` whose heads are 8 wide, two of them to each of keys and values."""
    options = {**SMALL, "hidden_size": 32, **OPTIONS.get(kind, {})}
    if "head_dim" in options:
        options["head_dim"] = 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **options), dtype=torch.float32
        ).train()


def trained(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The log-probs of a batch, and the gradients of the mean of them."""
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        found = forward.token_log_probs(model, batch, with_entropy=False)
    sft_loss(found, batch["labels"], batch["loss_mask"]).backward()
    return found.log_probs_N.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", sorted(forward.PACKABLE))
def test_every_layer_runs_the_kernel_under_autocast(kind: str) -> None:
    """Goal: one call a layer, forward and backward, for each architecture that packs; numbers are SDPA's in bf16.

    Red without the cast to autocast's dtype: rotary embeddings leave query and key in float32, and all but olmo2 had 0.
    """
    by_kernel = model_of(kind)
    by_runs = copy.deepcopy(by_kernel)
    forward.prepare(by_kernel)
    forward.prepare(by_runs)
    with flash_on_cpu() as calls:
        log_probs, gradients = trained(by_kernel)
    assert (calls.forward, calls.backward) == (LAYERS, LAYERS)
    expected, expected_gradients = trained(by_runs)
    assert calls.forward == LAYERS  # the stand-in is gone again
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=0.03)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.1, atol=0.02)


def in_lora(model: nn.Module) -> None:
    apply_lora(
        model,
        LoraSettings(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", init_seed=0),
        base_name="x",
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    ("change", "runs"),
    [(enable_activation_checkpointing, 2), (in_lora, 1)],
    ids=["checkpointing", "lora"],
)
def test_checkpointing_and_adapters_run_the_kernel(
    kind: str, change: Callable[[Any], Any], runs: int
) -> None:
    """Goal: the same with activations computed again (twice a layer) and with LoRA. Red without the cast."""
    model = model_of(kind)
    change(model)
    forward.prepare(model)
    with flash_on_cpu() as calls:
        trained(model)
    assert (calls.forward, calls.backward) == (runs * LAYERS, LAYERS)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, ended afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "olmo2", "phi3", "qwen3"])
def test_sharded_mixed_precision_runs_the_kernel(kind: str, tmp_path: Path, alone: None) -> None:
    """Goal: the kernel for FSDP's bf16 parameters, twice a layer with activations computed again; SDPA's loss.

    Red with float32 parameters (mixed_precision=False): the kernel would refuse them, and is not called.
    """
    losses = []
    config = FSDPConfig(
        sharding_strategy="FULL_SHARD", mixed_precision=True, gradient_checkpointing=True
    )
    for by_kernel in (False, True):
        backend = FSDPTrainingBackend(
            model_of(kind),
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            sft_loss,
            tmp_path,
            config,
        )
        with flash_on_cpu() if by_kernel else nullcontext(Calls()) as calls:
            losses.append(backend.forward_backward(batch_of()).wait()["loss"])
        assert calls == (Calls(2 * LAYERS, LAYERS) if by_kernel else Calls())
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def attention_of(
    lengths: list[int], attend: Callable[..., Any], dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """What `attend` gives for documents of `lengths`, with the gradients of query, key and value."""
    draw = torch.Generator().manual_seed(len(lengths))
    shapes = ((sum(lengths), heads, 8) for heads in (4, 2, 2))
    inputs = [
        torch.randn(1, *shape, generator=draw).to(dtype).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]
    out, _ = attend(nn.Module(), *inputs, None, documents=Documents.of(lengths, CPU), **options)
    weights = torch.arange(out.numel(), dtype=dtype).view(out.shape) / out.numel()
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


PACKS = ([5, 3, 3, 2, 2], [4, 2, 9], [7, 2, 2, 2], [5, 6], [9, 1, 1, 1, 1, 1], [8] * 7, [17])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_compiles_once_into_one_graph(window: int | None, kernel: bool) -> None:
    """Goal: whole under torch.compile, and packs of any documents run the same compiled code; the numbers are eager's.

    Red with `max(documents.lengths)` in it (compiled anew for each), and with the runs outside of the graph (a break).
    """
    dtype, counter = (
        (torch.bfloat16, CompileCounter()) if kernel else (torch.float64, CompileCounter())
    )
    options = {"scaling": 0.3, "sliding_window": window}
    with flash_on_cpu() if kernel else nullcontext():
        for backend in (counter, "aot_eager"):
            torch.compiler.reset()
            compiled = torch.compile(
                packed_attention.attention, backend=backend, dynamic=True, fullgraph=True
            )
            for lengths in PACKS:
                found = attention_of(lengths, compiled, dtype, **options)
                expected = attention_of(lengths, packed_attention.attention, dtype, **options)
                for mine, eager in zip(found, expected, strict=True):
                    torch.testing.assert_close(mine, eager, rtol=0, atol=1e-12 if not kernel else 0)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 8), (torch.bfloat16, 12), (torch.bfloat16, 264)]
)
def test_what_the_kernel_refuses_never_reaches_it(dtype: torch.dtype, width: int) -> None:
    """Goal: float32 and odd widths of a head go to SDPA. Red with the kernel wherever a card has one."""
    query, key = (torch.randn(1, heads, 6, width, dtype=dtype) for heads in (2, 1))
    with flash_on_cpu() as calls:
        out, _ = packed_attention.attention(
            nn.Module(), query, key, key, None, documents=Documents.of([4, 2], CPU)
        )
    assert out.shape == (1, 6, 2, width) and calls.forward == 0


def test_a_torch_without_shared_heads_gets_them_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: torch 2.11's kernel function has no `enable_gqa`. Red with it passed always: TypeError."""
    expected = attention_of([4, 2, 3], packed_attention.attention, torch.bfloat16)
    actual = packed_attention.varlen.varlen_attn

    def older(
        *tensors: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)
    ) -> Any:
        assert tensors[0].shape[1] == tensors[1].shape[1]
        return actual(*tensors, scale=scale, window_size=window_size)

    monkeypatch.setattr(packed_attention.varlen, "varlen_attn", older)
    monkeypatch.setattr(packed_attention, "_KERNEL_OPTIONS", frozenset({"scale", "window_size"}))
    with flash_on_cpu() as calls:
        found = attention_of([4, 2, 3], packed_attention.attention, torch.bfloat16)
    assert calls.forward == 1
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.02)
