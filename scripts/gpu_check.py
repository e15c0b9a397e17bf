"""Run what needs a GPU and add a record to docs/benchmarks.md. Called by scripts/gpu_check."""

import argparse
import datetime
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (the path above makes what follows importable)
import transformers  # noqa: E402

from benchmarks.gpu_sft import Speed, losses_on_both, matmul_flops_per_s, measure, qwen3_600m  # noqa: E402
from rollouts.training.flops import peak_flops  # noqa: E402

MFU_GOAL = 0.45  # of the measured matrix rate
LOSS_WITHIN = (
    0.01  # relative: bf16 keeps 8 bits, 0.4 % of a value; the mean over many tokens is closer
)
PACKED_TOKENS = (8192, 16384)


def record(
    *,
    command: str,
    card: str,
    versions: str,
    commit: str,
    date: str,
    matmul: float,
    speeds: list[Speed],
    losses: tuple,
) -> str:
    """Return one run as a section of docs/benchmarks.md."""
    stated = peak_flops(card)
    against = f"; the maker states {stated / 1e12:.0f}" if stated else ""
    lines = [
        f"### {card}, {date}",
        "",
        f"`{command}` at {commit}; {versions}. A bf16 matrix product made {matmul / 1e12:.0f} TFLOP/s{against}.",
        f"Loss of the same weights and tokens: CPU fp32 {losses[0]:.4f}, GPU bf16 {losses[1]:.4f}.",
        "",
        "| packed to | compile | tokens/s | MFU of measured rate | MFU of stated peak | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for speed in speeds:
        of_stated = f"{speed.flops_per_s / stated:.1%}" if stated else "unknown"
        lines.append(
            f"| {speed.micro_batch_tokens} | {'yes' if speed.compiled else 'no'} | {speed.tokens_per_s:.0f} "
            f"| {speed.flops_per_s / matmul:.1%} | {of_stated} | {speed.memory_bytes / 2**30:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def problems(speeds: list[Speed], losses: tuple[float, float]) -> list[str]:
    """Return what is wrong, rather than slow."""
    found = [
        f"loss not finite at {s.micro_batch_tokens} tokens: {s.losses}"
        for s in speeds
        if not _finite(s.losses)
    ]
    if not abs(losses[1] - losses[0]) <= LOSS_WITHIN * abs(losses[0]):
        found.append(
            f"loss {losses[1]} on the GPU in bf16, {losses[0]} on the CPU: needs to be within {LOSS_WITHIN:.0%}"
        )
    return found


def _finite(values: tuple[float, ...]) -> bool:
    return all(torch.isfinite(torch.tensor(values)).tolist())


def _output(*argv: str) -> str:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=10, help="measured optimizer steps, each of 4 micro-batches"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} finds no CUDA device; nothing was run\n"
            "  fix     run it on a host with a GPU, with a CUDA build of torch that fits its driver",
            file=sys.stderr,
        )
        return 2
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, check=False
    )
    if tests.returncode != 0:
        print(
            f"error: the gpu tests ended with {tests.returncode}; nothing was measured",
            file=sys.stderr,
        )
        return 1
    matmul, config, speeds = matmul_flops_per_s("cuda"), qwen3_600m(), []
    with tempfile.TemporaryDirectory() as name:
        losses = losses_on_both(config, device="cuda", directory=Path(name))
        for tokens in PACKED_TOKENS:
            for compiled in (False, True):
                options = {
                    "micro_batch_tokens": tokens,
                    "compiled": compiled,
                    "steps": arguments.steps,
                }
                speeds.append(measure(config, device="cuda", directory=Path(name), **options))
                torch.cuda.empty_cache()
                print(f"{speeds[-1]}  MFU {speeds[-1].flops_per_s / matmul:.1%}", flush=True)
    section = record(
        command="scripts/gpu_check",
        card=torch.cuda.get_device_name(),
        versions=f"torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}",
        commit=_output("git", "describe", "--always", "--dirty"),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        matmul=matmul,
        speeds=speeds,
        losses=losses,
    )
    with (ROOT / "docs" / "benchmarks.md").open("a", encoding="utf-8") as page:
        page.write("\n" + section)
    print(section)
    for speed in speeds:
        if speed.compiled and speed.flops_per_s < MFU_GOAL * matmul:
            print(f"below the goal of {MFU_GOAL:.0%} MFU: packed to {speed.micro_batch_tokens}")
    for problem in problems(speeds, losses):
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems(speeds, losses) else 0


if __name__ == "__main__":
    sys.exit(main())
