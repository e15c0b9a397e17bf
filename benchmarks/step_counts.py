"""What a training step asks of a card, counted without one, and the milliseconds and MFU that follow by arithmetic.

The real backend runs one micro-batch and one optimizer step of SFT or GRPO on fake tensors (`fake_step`); operations,
kernels, bytes, FLOPs, waits of the host, graph breaks and collectives are counted (`counting`, `fusion`), and `cards`
turns them into time. Not in the time: gaps between kernels, NCCL, clocks that fall under load, caches.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cards import CARDS, Card, host_s, kernel_s, mfu
from benchmarks.counting import Counts, Kernel
from benchmarks.fake_step import StepCounts, Work, count_step
from benchmarks.gpu_sft import qwen3_600m
from rollouts.training.flops import flops_per_token


def seconds(card: Card, kernels: Iterable[Kernel], *, best_products: bool = False) -> float:
    """Of all `kernels`, one after another without gaps."""
    return sum(
        kernel_s(card, kernel.kind, kernel.bytes, kernel.flops, best_products=best_products)
        for kernel in kernels
    )


def model_flops(config: Any, work: Work, *, full_attention: bool) -> float:
    """What the model needs for a micro-batch, once; attention counted causal, or in full as PaLM does."""
    length = work.document * (2 if full_attention else 1)
    return work.tokens * flops_per_token(config, length, head_share=work.trained / work.tokens)


def device_s(
    card: Card, found: StepCounts, micro_batches: int, *, best_products: bool = False
) -> float:
    """Seconds of the device for a micro-batch and its share of the optimizer step."""
    micro_batch = seconds(card, found.micro_batch.kernels, best_products=best_products)
    return (
        micro_batch
        + seconds(card, found.optimizer.kernels, best_products=best_products) / micro_batches
    )


def show_counts(found: StepCounts) -> None:
    for name, counts in (
        ("a micro-batch", found.micro_batch),
        ("an optimizer step", found.optimizer),
    ):
        print(
            f"\n{name}: {counts.operations} operations dispatched, {len(counts.waits)} waits of the host"
        )
        print(f"  {'part':10} {'kind':12} {'kernels':>8} {'GB':>8} {'TFLOP':>8}")
        for (part, kind), kernels in grouped(counts).items():
            moved, flops = sum(k.bytes for k in kernels), sum(k.flops for k in kernels)
            launches = sum(kernel.launches for kernel in kernels)
            print(f"  {part:10} {kind:12} {launches:8,} {moved / 1e9:8.1f} {flops / 1e12:8.2f}")
        collectives = sum(counts.collectives.values())
        print(
            f"  {'all':23} {launches_of(counts):8,} {moved_of(counts) / 1e9:8.1f}; collectives: {collectives}"
        )
    print(f"\ncompiled graphs: {len(found.graphs)}, graph breaks: {found.breaks}")


def grouped(counts: Counts) -> dict[tuple[str, str], list[Kernel]]:
    """The kernels by part and kind."""
    groups = defaultdict(list)
    for kernel in counts.kernels:
        groups[kernel.part, kernel.kind].append(kernel)
    return dict(sorted(groups.items()))


def launches_of(counts: Counts) -> int:
    return sum(kernel.launches for kernel in counts.kernels)


def moved_of(counts: Counts) -> int:
    return sum(kernel.bytes for kernel in counts.kernels)


def show_arithmetic(config: Any, work: Work, found: StepCounts, micro_batches: int) -> None:
    causal, full = (model_flops(config, work, full_attention=way) for way in (False, True))
    print(
        f"\nof the model: {causal / 1e12:.1f} TFLOP a micro-batch with causal attention, {full / 1e12:.1f} with full;"
        f" an optimizer step every {micro_batches} micro-batches"
    )
    print(
        "MFU in % of what is stated, then of what is measured for products (~: assumed 0.8 of what is stated);"
    )
    print(
        "best: products at the measured rate, not 0.78 of it. host: its time to launch, which may be what counts"
    )
    print(
        f"  {'card':16} {'ms':>6} {'host ms':>8} {'causal':>13} {'full':>13} {'best ms':>8} {'causal':>7}"
    )
    counts = found.micro_batch
    launching_s = host_s(counts.dispatched, launches_of(counts) - counts.dispatched)
    launching_s += host_s(found.optimizer.dispatched, 0) / micro_batches
    for name, card in CARDS.items():
        total_s = max(launching_s, device_s(card, found, micro_batches))
        best_s = max(launching_s, device_s(card, found, micro_batches, best_products=True))
        about = " " if card.is_measured else "~"
        shares = [
            f"{100 * mfu(flops, total_s, card.stated):5.1f} {about}{100 * mfu(flops, total_s, card.measured):5.1f}"
            for flops in (causal, full)
        ]
        print(
            f"  {name:16} {1e3 * total_s:6.1f} {1e3 * launching_s:8.1f} {shares[0]:>13} {shares[1]:>13}"
            f" {1e3 * best_s:8.1f} {100 * mfu(causal, best_s, card.stated):7.1f}"
        )


def show_terms(found: StepCounts, name: str) -> None:
    """Where the time of one card goes, the largest first."""
    card = CARDS[name]
    print(f"\nwhere a micro-batch's time goes on {name}, ms:")
    terms = {key: seconds(card, kernels) for key, kernels in grouped(found.micro_batch).items()}
    for (part, kind), taken in sorted(terms.items(), key=lambda term: -term[1]):
        print(f"  {part:10} {kind:12} {1e3 * taken:6.1f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Count a training step of the Qwen3-0.6B shape on fake tensors and estimate its time on cards."
    )
    parser.add_argument(
        "--kind", choices=("sft", "rl"), default="sft", help="sft, or rl: GRPO on sampled groups"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch (default 8192)")
    parser.add_argument(
        "--document", type=int, default=1024, help="tokens of each document (default 1024)"
    )
    parser.add_argument(
        "--micro-batches", type=int, default=4, help="of an optimizer step (default 4)"
    )
    parser.add_argument(
        "--layers", type=int, default=28, help="of the model (default 28, the whole of it)"
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--checkpointing", action="store_true", help="with activation checkpointing"
    )
    parser.add_argument(
        "--card",
        choices=CARDS,
        default="H200 SXM",
        help="whose terms are listed (default H200 SXM)",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="that hold whole copies of the model (default 1)"
    )
    arguments = parser.parse_args(argv)
    config = qwen3_600m()
    config.num_hidden_layers = arguments.layers
    work = Work(tokens=arguments.tokens, document=arguments.document, kind=arguments.kind)
    found = count_step(
        config,
        work,
        memory_gib=CARDS[arguments.card].memory_gib,
        compiled=not arguments.eager,
        checkpointing=arguments.checkpointing,
        ranks=arguments.ranks,
    )
    print(
        f"{arguments.kind}, {arguments.layers} layers, {work.tokens} tokens in documents of {work.document}"
    )
    show_counts(found)
    show_arithmetic(config, work, found, arguments.micro_batches)
    show_terms(found, arguments.card)


if __name__ == "__main__":
    main()
