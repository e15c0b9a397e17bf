"""What cards can do, and the arithmetic that makes milliseconds and MFU of counts. Pure.

Not in the arithmetic: gaps between kernels, tails of the last wave, clocks that fall under load, what a kernel loses
for shapes that fit it badly beyond the factors below, memory that stays in a cache between kernels, NCCL. It is an
estimate, good to about 30 %: a record of a card takes its place.
"""

from dataclasses import dataclass

PRODUCTS_SHARE = (
    0.78  # of the measured rate: products 1,024 to 3,072 wide, below the best shape. An assumption
)
BANDWIDTH_SHARE = 0.81  # of the stated bandwidth, for elementwise kernels. An assumption
# of the host's time for a kernel: PyTorch's, and a compiled part's. Assumed
LAUNCH_S, COMPILED_LAUNCH_S = 6.5e-6, 3e-6


@dataclass(frozen=True)
class Card:
    """FLOP/s in bf16 with float32 sums, dense; bytes/s.

    `stated` and `bandwidth` are the maker's. `measured` is the best of a search over shapes of bf16 products by
    mamf-finder (github.com/stas00/ml-engineering, compute/accelerator, torch 2.6 to 2.7; that table gives H200 the
    H100's), where `is_measured`; else 0.8 of what is stated, as those cards reach. `attention` is the rate of the
    variable-length kernel, FlashAttention 2 (arXiv 2307.08691: up to 230 forward and backward on an A100, 335 on an
    H100, for long sequences), less for documents of about 1,000 tokens: an assumption.
    """

    stated: float
    measured: float
    is_measured: bool
    bandwidth: float
    attention: float
    memory_gib: float


CARDS = {  # bf16 and bandwidth from NVIDIA's data sheets; GeForce: the Ada architecture's paper
    "RTX 4090": Card(165.2e12, 132e12, False, 1.008e12, 80e12, 24),
    "L40S": Card(362e12, 290e12, False, 0.864e12, 150e12, 48),
    "A100 SXM 80 GB": Card(312e12, 271.2e12, True, 2.039e12, 170e12, 80),
    "H100 SXM": Card(989e12, 794.5e12, True, 3.35e12, 300e12, 80),
    "H200 SXM": Card(989e12, 794.5e12, True, 4.8e12, 300e12, 141),
    "B200 SXM": Card(2250e12, 1745e12, True, 8.0e12, 300e12, 180),
}


def kernel_s(
    card: Card, kind: str, moved: float, flops: float, *, best_products: bool = False
) -> float:
    """Seconds of one kernel: as long as its arithmetic or its memory takes, whichever is more.

    `best_products`: products run at the rate that was measured, in place of PRODUCTS_SHARE of it.
    """
    memory_s = moved / (BANDWIDTH_SHARE * card.bandwidth)
    if kind == "attention":
        return max(memory_s, flops / card.attention)
    if kind == "product":
        return max(memory_s, flops / (card.measured * (1.0 if best_products else PRODUCTS_SHARE)))
    return memory_s


def host_s(dispatched: int, compiled: int) -> float:
    """Seconds that the host takes to launch kernels. The device waits for it only where this is more than its own."""
    return dispatched * LAUNCH_S + compiled * COMPILED_LAUNCH_S


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation."""
    return flops / seconds / peak
