"""The steps of scripts/gpu_first_hour that are not tests: python scripts/gpu_first_hour_steps.py NAME [--cpu].

A line of output that begins with "> " is a figure, which the checklist shows. Exit 1 where a step fails.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base_config import Config, changed, load_config  # noqa: E402  (the path above makes it importable)
from rollouts.run_dir import LaunchPlan, RunDir, home_dir, read_jsonl, run_path  # noqa: E402
from scripts.gpu_first_hour_figures import children_of, losses_apart, memory_peaks  # noqa: E402

QUERY = "driver_version,mig.mode.current,compute_mode,memory.total,memory.free"
HOST = (
    f"command -v nvidia-smi >/dev/null && nvidia-smi && nvidia-smi --query-gpu={QUERY} --format=csv",
    "python3 -V",
    "ldd --version | head -1",
    "for tool in ninja nvcc c++ gcc; do command -v $tool || echo $tool: not here; done",
    "ls -d /usr/local/cuda*",
    "python3 -c 'import sysconfig; print(sysconfig.get_paths()[\"include\"])' | xargs -I{} ls {}/Python.h",
    "df -h /dev/shm",
    "echo CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-not set}",
)
# What each line that runs a config changes of a shipped one
FEW: dict[str, Any] = {
    "rl.eval_every": -1,
    "rl.eval_examples": 16,
    "data.eval_mixture.0.max_samples": 16,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("01_debug_sft_rl", {}),
    "killed": ("01_debug_sft_rl", {
        **FEW, "output.mode": "rl", "data.rl_mixture.0.max_samples": 64, "engine.restarts_max": 2}),
    "asleep": ("01_debug_sft_rl", {
        **FEW, "output.mode": "rl", "data.rl_mixture.0.max_samples": 8, "engine.sleep_while_training": True}),
    "one-rank": ("01_debug_sft_rl", {
        "output.mode": "sft", "sft.num_iterations": 10, "sft.log_every": 1, "sft.eval_every": -1}),
    "two-ranks": ("01_debug_sft_rl", {
        "output.mode": "sft", "sft.num_iterations": 10, "sft.log_every": 1, "sft.eval_every": -1,
        "target.gpu_ranks": [0, 1], "target.sharding": "full_shard"}),
    "rl-math": ("rl_math", {"data.rl_mixture.0.max_samples": 3 * 64, "rl.eval_every": -1, "rl.eval_examples": 16}),
}  # fmt: skip
LOSSES_WITHIN = 0.05  # of one and two ranks in bfloat16, over ten steps


class StepError(Exception):
    """A step failed. The message says what was found and what is needed."""


# --- the host, and torch on it --------------------------------------------------------------------------------------


def host(_: argparse.Namespace) -> None:
    """Print what the host is."""
    for command in HOST:
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
        )
        print(done.stdout, done.stderr, sep="", flush=True)


def facts(_: argparse.Namespace) -> None:
    """Look at this host as `deploy --remote` does; fail where GPU configs would meet a lack."""
    from rollouts.remote.host.facts import gather_facts
    from rollouts.remote.host.local import LocalTransport
    from rollouts.remote.plan.gpu_problems import host_advice
    from rollouts.remote.texts import facts_text

    found = gather_facts(LocalTransport())
    print(facts_text("local", found, []))
    advice = [problem.text() for problem in host_advice(found, "local")]
    if advice:
        raise StepError("\n".join(advice))


def config(arguments: argparse.Namespace) -> None:
    """Make the config that a line runs: what its changes are of is there."""
    made = derived(arguments.config)
    print(f"> {arguments.config}: {made.output.mode} on GPUs {made.target.gpu_ranks}")


def torch_build(arguments: argparse.Namespace) -> None:
    """Print torch, its CUDA and NCCL; hold it against the lock that engines share."""
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    print(
        f"> torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}, {torch.cuda.device_count()} cards"
    )
    if not arguments.cpu:
        lock = (ROOT / "requirements" / "trainer-cuda.txt").read_text().splitlines()
        pinned = next(line.split("==")[1].split()[0] for line in lines_of(lock, "torch=="))
        if not torch.cuda.is_available():
            raise StepError(
                f"torch sees no card: torch {torch.__version__}, CUDA {torch.version.cuda}"
            )
        if torch.__version__.partition("+")[0] != pinned:
            raise StepError(
                f"torch {torch.__version__}, needs {pinned} of requirements/trainer-cuda.txt"
            )


def lines_of(lines: Sequence[str], start: str) -> Iterator[str]:
    return (line for line in lines if line.startswith(start))


def smoke(_: argparse.Namespace) -> None:
    """Run the smoke test of a run, on the CPU."""
    from rollouts.training.smoke import main as smoke_main

    if smoke_main(["trainer", "--device", "cpu"]):
        raise StepError("see its error line")


def product(_: argparse.Namespace) -> None:
    """Measure the rate of a large bf16 product."""
    import torch

    from benchmarks.gpu_sft import matmul_flops_per_s
    from rollouts.training.flops import peak_flops

    rate, stated = matmul_flops_per_s("cuda"), peak_flops(torch.cuda.get_device_name())
    of_stated = f", {rate / stated:.0%} of the stated {stated / 1e12:.0f}" if stated else ""
    print(f"> {rate / 1e12:.0f} TFLOP/s{of_stated}")
    if stated and rate < 0.5 * stated:
        raise StepError(f"less than half of the stated rate: {rate / stated:.0%}")


def attention(arguments: argparse.Namespace) -> None:
    """Compare packed attention with its formula: heads of 64 and 128, shared heads, a window; both passes."""
    import torch

    from rollouts.training import device_checks, packed_attention

    device, calls = torch.device("cpu" if arguments.cpu else "cuda"), 0
    if not arguments.cpu:
        kernel = packed_attention.varlen.varlen_attn

        def counted(*given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return kernel(*given, **options)

        packed_attention.varlen.varlen_attn = counted
    for head_dim in device_checks.HEAD_DIMS:
        for window in (None, 7):
            device_checks.check_attention(device, head_dim, packed=True, window=window)
    print(f"> {calls} calls of the kernel")
    if not arguments.cpu and calls == 0:
        raise StepError("the variable-length kernel was never called")


def profile(_: argparse.Namespace) -> None:
    """Profile a packed step of 8,192 tokens."""
    import torch

    from benchmarks.gpu_sft import measure, qwen3_600m

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with (
        tempfile.TemporaryDirectory() as name,
        torch.profiler.profile(activities=activities) as profiler,
    ):
        measure(
            qwen3_600m(),
            device="cuda",
            micro_batch_tokens=8192,
            directory=Path(name),
            compiled=False,
            steps=1,
        )
    print(
        profiler.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=10, max_name_column_width=60
        )
    )


# --- configs ----------------------------------------------------------------------------------------------------------


def derived(name: str) -> Config:
    base, changes = CONFIGS[name]
    label = {"output.experiment_name": f"first-hour-{name}"}
    made = changed(load_config(ROOT / "configs" / f"{base}.py"), {**changes, **label})
    if problems := made.problems():
        raise StepError(f"config {name}: {'; '.join(problems)}")
    return made


def deploy(name: str, *arguments: str) -> tuple[int, RunDir]:
    """Run a derived config on this host to its end. Returns its exit code and its directory on the host."""
    run_id = f"first-hour-{name}-{os.getpid()}"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        derived(name).save(file)
        command = [sys.executable, "deploy.py", str(file), "--run-id", run_id, *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return code, RunDir(run_path(home_dir(), run_id))


def run(arguments: argparse.Namespace) -> None:
    """Run a config to its end, with the peak of each card's memory."""
    with memory_peaks() as peaks:
        code, _ = deploy(arguments.config)
    print(f"> peak of memory, MiB by card: {peaks}")
    if code:
        raise StepError(f"the run ended with {code}")


def kill(_: argparse.Namespace) -> None:
    """Kill SGLang's scheduler in mid-RL: the run goes on with an engine that was started again."""
    from rollouts.worker.processes import marked_processes, window_mark

    code, there = deploy("killed", "--detach")
    if code:
        raise StepError(f"the launch ended with {code}")
    await_true(lambda: len(read_jsonl(there.metrics)) >= 2, "the second step", 1200)
    pids = marked_processes(there, {window_mark("rl", "engine-0")})
    named = [pid for pid in pids if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if not named:
        raise StepError(f"no scheduler among the engine's processes {pids}")
    os.kill(named[0], signal.SIGKILL)
    code = subprocess.run(
        [sys.executable, "deploy.py", "attach", there.run_id], cwd=ROOT, check=False
    ).returncode
    kinds = [row["kind"] for row in read_jsonl(there.events)]
    print(
        f"> restarts: {kinds.count('engine_restarted')}, recoveries: {kinds.count('engine_recovered')}"
    )
    if code or "engine_recovered" not in kinds:
        raise StepError(
            f"the run ended with {code}, {kinds.count('engine_recovered')} recoveries; needs 0 and 1"
        )


def await_true(condition: Callable[[], bool], what: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise StepError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.5)


def ranks(_: argparse.Namespace) -> None:
    """Run ten SFT steps on one card and sharded over two: equal losses; no second process on the first card."""
    (code, one), crowded = deploy("one-rank"), set()
    if code:
        raise StepError(f"one rank: the run ended with {code}")
    done = threading.Event()

    def look() -> None:
        query = ["nvidia-smi", "-i", "0", "--query-compute-apps=pid", "--format=csv,noheader"]
        while not done.wait(1.0):
            pids = subprocess.run(
                query, capture_output=True, text=True, timeout=30, check=False
            ).stdout.split()
            if len(pids) > 1:
                crowded.add(tuple(pids))

    threading.Thread(target=look, daemon=True).start()
    code, two = deploy("two-ranks")
    done.set()
    if code:
        raise StepError(f"two ranks: the run ended with {code}")
    apart = losses_apart(
        *([row["loss"] for row in read_jsonl(there.metrics)] for there in (one, two))
    )
    print(
        f"> losses differ by at most {apart:.4f}; on card 0 at a time: {sorted(crowded) or 'one process'}"
    )
    if not apart <= LOSSES_WITHIN:
        raise StepError(f"losses differ by {apart:.4f}, needs at most {LOSSES_WITHIN}")
    if crowded:
        raise StepError("the second rank has a context on the first card")


def engine_plan() -> LaunchPlan:
    """Return what the host would do for configs/01."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "config.json"
        derived("whole").save(file)
        command = [sys.executable, "deploy.py", str(file), "--plan", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return LaunchPlan.from_json(json.loads(done.stdout.splitlines()[0])["launch"])


def engine_environment(_: argparse.Namespace) -> None:
    """Make SGLang's environment by its lock, by the plan of configs/01, and try it. Prints its directory."""
    from rollouts.worker.engine_tools import with_tools
    from rollouts.worker.environments.installer import BootstrapDeadline
    from rollouts.worker.environments.virtual_environment import ensure_environment

    launch = engine_plan()
    with tempfile.TemporaryDirectory() as name:
        scratch, started = RunDir(Path(name)), time.monotonic()
        scratch.code.mkdir()
        ensure_environment(
            launch.environments[1], scratch, BootstrapDeadline(1700, tick=lambda: None)
        )
        print(f"> {launch.environments[1].path} after {time.monotonic() - started:.0f} s")
        check = launch.smoke[1].process
        argv = [*check.argv]
        argv[argv.index("--report") + 1] = str(scratch.path / "report")
        environment = with_tools(
            {**os.environ, **check.env}, Path(check.tools_of), declared=check.env
        )
        if subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode:
            raise StepError("the environment does not pass its smoke test")


def broadcast(_: argparse.Namespace) -> None:
    """Test the broadcast over NCCL; if it is not over in time, print the stacks of all that wait."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "gpu",
        "tests/gpu/test_broadcast.py",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(200)
    except subprocess.TimeoutExpired:
        spy = shutil.which("py-spy")
        for pid in [process.pid, *children_of(process.pid)]:
            print(f"--- {pid}", flush=True)
            subprocess.run([spy or "true", "dump", "--pid", str(pid)], check=False)
        process.kill()
        raise StepError(
            f"not over after 200 s{'' if spy else '; with py-spy on PATH its stacks are shown'}"
        ) from None
    if code:
        raise StepError(f"the test ended with {code}")


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "host": host,
    "facts": facts,
    "config": config,
    "torch": torch_build,
    "smoke": smoke,
    "product": product,
    "attention": attention,
    "profile": profile,
    "engine-environment": engine_environment,
    "run": run,
    "kill": kill,
    "ranks": ranks,
    "broadcast": broadcast,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("config", nargs="?", choices=CONFIGS, default="whole")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        STEPS[arguments.step](arguments)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
