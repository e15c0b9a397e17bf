"""Run the checklist for a new GPU host. Called by scripts/gpu_first_hour; its steps are in gpu_first_hour_steps.py."""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PYTHON = sys.executable
STEPS = (PYTHON, "scripts/gpu_first_hour_steps.py")
GPU_TESTS = (PYTHON, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider")
TAIL_LINES = 15
OK, FAILED, LATER = "ok", "FAILED", "needs"


@dataclass(frozen=True)
class Line:
    """One line of the checklist."""

    minute: int  # of the hour, at which it begins if all before went well
    name: str
    meaning: str  # of a failure
    command: tuple[str, ...]
    cards: int = 1  # that it needs
    dry: tuple[str, ...] = ()  # the step that does the part of it that a CPU can do
    limit_s: float = 300.0


def step(name: str, *arguments: str) -> tuple[str, ...]:
    return (*STEPS, name, *arguments)


def tests(file: str, *options: str) -> tuple[str, ...]:
    return (*GPU_TESTS, f"tests/gpu/{file}", *options)


LINES = (
    Line(0, "nvidia-smi and the host's tools", "the host: driver, glibc, Python, compilers, /dev/shm", step("host"),
         dry=("host",)),
    Line(2, "the host as deploy sees it", "facts of the host that are read wrongly, or that it lacks", step("facts"),
         dry=("facts",)),
    Line(3, "the plan of configs/01", "what the plan says: a config that this host cannot run",
         (PYTHON, "deploy.py", "configs/01_debug_sft_rl.py", "--plan"), dry=("config", "whole")),
    Line(4, "torch", "no card seen: driver against build; another torch or NCCL than the engine's lock", step("torch"),
         dry=("torch", "--cpu")),
    Line(6, "smoke test", "see its error line: driver, build, device and part",
         (PYTHON, "-m", "rollouts.training.smoke", "trainer", "--device", "cuda"), dry=("smoke",)),
    Line(7, "a bf16 product of 8192 x 8192, TFLOP/s", "the card or its driver: clocks, power, another process",
         step("product")),
    Line(8, "packed attention alone, with a window too", "the kernel, or its code for this card", step("attention"),
         dry=("attention", "--cpu")),
    Line(9, "training on the card is the CPU's, and calls the kernel",
         "no calls: the kernel is passed over; wrong numbers: the documents' offsets",
         tests("test_cuda.py", "-k", "not True"), limit_s=600),
    Line(12, "the same, compiled", "no gcc or Python.h; or the graph breaks: see graph_breaks in the log",
         ("env", "TORCH_LOGS=graph_breaks", *tests("test_cuda.py", "-k", "True")), limit_s=900),
    Line(15, "speed of a 0.6B model, into docs/benchmarks.md", "loss, or no memory: see the error line",
         ("scripts/gpu_check",), limit_s=1800),
    Line(20, "where a step's time goes: top 10", "much in to/add_/mm of [V, D]: the head; many small SDPAs: the kernel",
         step("profile"), limit_s=600),
    Line(22, "SGLang's environment alone", "the lock: Python, glibc, an index that cannot be reached",
         step("engine-environment"), dry=("config", "whole"), limit_s=1800),
    Line(27, "SGLang alone, started twice", "ninja, nvcc or Python.h: kernels cannot be built; memory: its fraction",
         tests("test_sglang.py", "-k", "starts", "-s"), limit_s=1800),
    Line(33, "SGLang's log-probs, and disk sync by hand and under load",
         "more than 0.25: weights, dtype or backend; a flush refused: requests that are retracted",
         tests("test_sglang.py", "-k", "scores or disk"), limit_s=900),
    Line(38, "weights over CUDA IPC, to the embedded engine", "CUDA IPC on this host: ptrace, a container, segments",
         tests("test_weight_delivery.py"), limit_s=600),
    Line(40, "weights over CUDA IPC, to SGLang", "only this one fails: torch's versions differ, or the card's UUID",
         tests("test_sglang.py", "-k", "tensor"), limit_s=900),
    Line(44, "configs/01 whole, with the cards' peak of memory", "wiring; a peak above the plan: its sums are off",
         step("run", "whole"), dry=("config", "whole"), limit_s=3600),
    Line(50, "SGLang's scheduler killed in mid-RL", "a restart beside the trainer's memory: engine.max_total_tokens",
         step("kill"), dry=("config", "killed"), limit_s=1800),
    Line(53, "one step with an engine that sleeps", "exit 127: the memory saver's library; out of memory: what it left",
         step("run", "asleep"), dry=("config", "asleep"), limit_s=1200),
    Line(56, "all-reduce over two ranks", "NCCL, or cards that do not reach each other (P2P)",
         (PYTHON, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
          "-m", "rollouts.training.smoke", "trainer", "--device", "cuda"), cards=2),
    Line(57, "two sharded ranks train as one does", "sharding on CUDA; a rank on another's card: its thread's device",
         step("ranks"), cards=2, dry=("config", "two-ranks"), limit_s=1800),
    Line(59, "broadcast over NCCL", "stuck in dist.broadcast: see py-spy's stacks; ncclInvalidUsage: NCCL's versions",
         step("broadcast"), cards=2, limit_s=300),
    Line(60, "rl_math, three steps", "the router, or two replicas", step("run", "rl-math"), cards=4,
         dry=("config", "rl-math"), limit_s=3600),
)  # fmt: skip


def cards_here() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.count("GPU ") if done.returncode == 0 else 0


def run_line(line: Line, log: Path) -> tuple[bool, list[str]]:
    """Return whether it went well, and its last lines. Everything that it said is in the log."""
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"\n=== {line.name}: {' '.join(line.command)}\n")
        file.flush()
        before = log.stat().st_size
        # Its own process group, so that nothing of a line that took too long is left for the next
        process = subprocess.Popen(
            line.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code, late = process.wait(line.limit_s), ""
        except subprocess.TimeoutExpired:
            code, late = -1, f"not over after {line.limit_s:g} s"
        finally:
            end_group(process)
    said = log.read_bytes()[before:].decode(errors="replace").splitlines()
    tail = [text for text in said if text.strip()][-TAIL_LINES:]
    return code == 0, [*tail, *([late] if late else [])]


def run_dry(line: Line, log: Path) -> tuple[bool, list[str]]:
    """Run what a CPU can do of it, in this process: torch is imported once."""
    from scripts import gpu_first_hour_steps

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = gpu_first_hour_steps.main(line.dry)
        except Exception:  # a line that fails does not end the others
            traceback.print_exc(file=said)
            code = 1
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n=== {line.name}: {' '.join(line.dry)}\n{said.getvalue()}")
    return code == 0, [text for text in said.getvalue().splitlines() if text.strip()][-TAIL_LINES:]


def end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def chosen(only: str) -> list[Line]:
    return [line for line in LINES if only.lower() in line.name.lower()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Run the checklist for a new GPU host, line by line."
    )
    parser.add_argument("--dry-run", action="store_true", help="what a CPU allows")
    parser.add_argument("--only", default="", help="the lines whose name has this in it")
    parser.add_argument("--log", type=Path, default=ROOT / "runs" / "gpu_first_hour.log")
    arguments = parser.parse_args(argv)
    lines = chosen(arguments.only)
    if not lines:
        parser.error(
            f"--only {arguments.only!r}: no line has it; they are: {'; '.join(line.name for line in LINES)}"
        )
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    cards, failed = 0 if arguments.dry_run else cards_here(), 0
    for line in lines:
        if cards < line.cards and not (arguments.dry_run and line.dry):
            print(
                f"{LATER:6} {line.cards} card{'s' if line.cards > 1 else ''}  {line.name}",
                flush=True,
            )
            continue
        started = time.monotonic()
        well, tail = (
            run_dry(line, arguments.log) if arguments.dry_run else run_line(line, arguments.log)
        )
        print(
            f"{OK if well else FAILED:6} {time.monotonic() - started:5.1f} s  {line.name}",
            flush=True,
        )
        failed += not well
        for text in (
            [*tail, f"means: {line.meaning}"]
            if not well
            else [text for text in tail if text[:2] == "> "]
        ):
            print(f"       {text}", flush=True)
    print(f"{len(lines)} lines, {failed} failed; all that they said: {arguments.log}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
