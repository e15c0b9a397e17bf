"""Peak memory of token log-probs and cross-entropy, forward and backward, beside the plain way: 150K vocabulary.

`python benchmarks/memory.py` prints for both the most memory held at once beyond weights and hidden states, the
seconds, the loss, and the ratio. Ours is `log_probs.selected_log_probs`: the output head a chunk of tokens at a time.
The plain way is `cross_entropy((hidden @ weight.T).float())`. Each runs in a process of its own: on a CPU the peak is
the process's resident memory (Linux), on CUDA what torch allocated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("plain", "ours")
MIB = 2**20


def resident_bytes(entry: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry + ":"))


def loss_of(
    way: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    if way == "plain":
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)
    from rollouts.training.log_probs import selected_log_probs

    log_probs, _ = selected_log_probs(
        hidden, torch.arange(len(hidden), device=hidden.device), targets, weight
    )
    return -log_probs.mean()


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass after a small one to warm up. Memory is counted beyond the inputs."""
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(
        options.tokens, options.width, device=options.device, dtype=dtype, requires_grad=True
    )
    weight = torch.randn(options.vocabulary, options.width, device=options.device, dtype=dtype)
    weight = (weight / options.width**0.5).requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,), device=options.device)
    loss_of(way, hidden[:2], weight[:8], targets[:2] % 8).backward()
    weight.grad = hidden.grad = None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
    start = time.perf_counter()
    loss = loss_of(way, hidden, weight, targets)
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    assert weight.grad is not None
    return {
        "peak_mib": (peak - before) / MIB,
        "seconds": seconds,
        "loss": loss.item(),
        "grad_norm": weight.grad.float().norm().item(),
    }


def in_own_process(way: str, options: argparse.Namespace) -> dict[str, float]:
    sizes = ("tokens", "width", "vocabulary", "threads", "device")
    flags = [word for name in sizes for word in (f"--{name}", str(getattr(options, name)))]
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # this process is a child
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    logits_mib = options.tokens * options.vocabulary * 4 / MIB
    gradient_mib = options.vocabulary * options.width * (2 if options.device == "cuda" else 4) / MIB
    print(
        f"{options.tokens} tokens x {options.width} wide, vocabulary {options.vocabulary}, {options.device}"
    )
    print(
        f"all logits in fp32: {logits_mib:.0f} MiB; the head's gradient, which both must hold: {gradient_mib:.0f} MiB"
    )
    results = {way: in_own_process(way, options) for way in WAYS}
    print(f"{'':8}{'peak MiB':>10}{'seconds':>10}{'loss':>12}{'grad norm':>12}")
    for way, result in results.items():
        print(
            f"{way:8}{result['peak_mib']:10.0f}{result['seconds']:10.2f}{result['loss']:12.6f}{result['grad_norm']:12.6f}"
        )
    print(f"ratio of peaks: {results['plain']['peak_mib'] / results['ours']['peak_mib']:.2f}")


if __name__ == "__main__":
    main()
