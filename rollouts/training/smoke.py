"""Checks of a device before anything trains on it, in seconds: a bf16 product, packed attention, an all-reduce.

    torchrun ... -m rollouts.training.smoke --device cuda --store NEW_FILE

Each check raises SmokeError, whose message names build, driver and device. A CPU runs the same checks.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollouts.training import distributed
from rollouts.training.devices import DeviceError, describe_build
from rollouts.training.packed_attention import Documents, attention

HEAD_DIMS = (64, 128)
WITHIN = 0.03  # of the largest value; bf16 keeps 8 bits


class SmokeError(RuntimeError):
    """A device computes wrongly, or not at all."""


def check_product(device: torch.device) -> None:
    """A bf16 matrix product is near the one in float32 on the CPU."""
    left, right = (torch.randn(256, 256, generator=_seeded()).bfloat16() for _ in range(2))
    _require_close("the bf16 product", device, (left.to(device) @ right.to(device)), left.float() @ right.float())


def check_attention(device: torch.device, head_dim: int) -> None:
    """Packed attention with grouped heads is near SDPA per document in float32, forward and backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths, generator = [5, 33, 26], _seeded()
    inputs = [torch.randn(1, heads, 64, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2)]
    ours = [tensor.to(device).requires_grad_() for tensor in inputs]
    query, key, value = ours
    packed, _ = attention(nn.Identity(), query, key, value, None, documents=Documents.of(lengths, device))
    theirs = [tensor.float().requires_grad_() for tensor in inputs]
    parts = zip(*(tensor.split(lengths, 2) for tensor in theirs), strict=True)
    alone = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
    expected = torch.cat(alone, 2).transpose(1, 2)
    packed.float().square().sum().backward()
    expected.square().sum().backward()
    _require_close(f"attention, head_dim {head_dim}", device, packed, expected)
    for name, mine, reference in zip("qkv", ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        _require_close(f"attention's gradient of {name}, head_dim {head_dim}", device, mine.grad, reference.grad)


def check_all_reduce(device: torch.device) -> None:
    """The ranks' numbers add up, on the device."""
    total = torch.tensor([float(distributed.rank() + 1)], device=device)
    distributed.all_reduce_sum([total])
    ranks = distributed.world_size()
    _require_close(f"an all-reduce over {ranks} ranks", device, total, torch.tensor([ranks * (ranks + 1) / 2]))


def run_all(device_type: str, *, store_file: Path | None, timeout_s: float = 60.0) -> None:
    """Run every check on this rank's device. Raises SmokeError or DeviceError."""
    device = distributed.initialize(device_type, timeout_s=timeout_s, store_file=store_file)
    try:
        check_product(device)
        for head_dim in HEAD_DIMS:
            check_attention(device, head_dim)
        check_all_reduce(device)
    except RuntimeError as error:
        if isinstance(error, SmokeError):
            raise
        raise SmokeError(f"{_where(device)}: {error}") from error
    finally:
        distributed.shutdown()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _require_close(what: str, device: torch.device, found: Tensor, expected: Tensor) -> None:
    apart = (found.detach().float().cpu() - expected.detach()).abs().max().item()
    limit = WITHIN * expected.detach().abs().max().item()
    if not apart <= limit:
        raise SmokeError(f"{what} is wrong by {apart:.3g}, needs at most {limit:.3g}, on {_where(device)}")


def _where(device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"device {device}{name} with {describe_build()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check this machine's devices before anything trains on them.")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--store", type=Path, help="a file that does not exist, where the ranks find each other")
    arguments = parser.parse_args()
    try:
        run_all(arguments.device, store_file=arguments.store)
    except (SmokeError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
