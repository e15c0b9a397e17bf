"""gpu.jsonl: how busy a run's GPUs and processes are, sampled beside it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts.machine.nvidia_smi import GpuUsage, read_usage
from rollouts.run_dir import GPUS_VARIABLE, RunDir, read_jsonl
from rollouts.worker.processes import WINDOW_VARIABLE, run_marks
from rollouts.worker.supervise import usage_sampler
from rollouts.worker.supervise.usage_sampler import UsageSampler, interval_s
from tests.ports import free_port
from tests.worker.stands import REPOSITORY, Host, engine, events, stage, trainer

# As driver 580 answers: cards in the order of their numbers, those that --id names alone
NVIDIA_SMI = """#!{python}
import sys
from pathlib import Path
with Path({calls!r}).open("a") as calls:
    print(*sys.argv[1:], file=calls)
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
if {fails!r}:
    print("Failed to initialize NVML: Driver/library version mismatch")
    sys.exit(18)
cards = {{
    0: {{"index": "0", "utilization.gpu": "97", "memory.used": "1024", "memory.total": "81559"}},
    1: {{"index": "1", "utilization.gpu": "3", "memory.used": "62464", "memory.total": "81559"}},
    2: {{"index": "2", "utilization.gpu": "[N/A]", "memory.used": "0", "memory.total": "81559"}},
    3: {{"index": "3", "utilization.gpu": "55", "memory.used": "9", "memory.total": "81559"}},
}}
assert options["format"] == "csv,noheader,nounits"
for number in map(int, options["id"].split(",")):
    print(*(cards[number][name] for name in options["query-gpu"].split(",")), sep=", ")
"""
# A trainer's rank, which ends once it was seen
SEEN = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1] if len(sys.argv) > 1 else __import__("os").environ["SEEN"]).exists():
    time.sleep(0.05)
"""

# One that ends once the engine's memory was seen: what was sampled as it began has next to none
ENGINE_SEEN = """
import json, os, time
from rollouts.run_dir import read_jsonl
from pathlib import Path
while not any(entry["name"] == "engine-0" and entry["memory_gib"] for row in read_jsonl(Path(os.environ["SEEN"]))
              for entry in row["processes"]):
    time.sleep(0.05)
"""


def fake_smi(directory: Path, *, fails: bool = False) -> dict[str, str]:
    """Put an nvidia-smi into the directory; return the environment that finds it."""
    directory.mkdir()
    file = directory / "nvidia-smi"
    calls = str(directory / "calls")
    file.write_text(NVIDIA_SMI.format(python=sys.executable, calls=calls, fails=fails))
    file.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def job_env(host: Host, job_path: str, **more: str) -> dict[str, str]:
    return {"LOCAL_RANK": "0", "SEEN": f"{job_path}/gpu.jsonl", **more}


def test_a_runs_gpus_are_sampled_by_process(host: Host, tmp_path: Path) -> None:
    """Goal: each card with the processes that have it, its use and memory; what a card does not tell is null, and
    cards of others are not asked. Red with cards numbered from 0, and with a bracket read as a number."""
    smi = fake_smi(tmp_path / "bin")
    port = free_port()
    job = host.job(
        stage(
            "rl",
            trainer(SEEN),
            engine(port, env={GPUS_VARIABLE: "2,1"}),
        ),
        host_env=smi,
    )
    job["plan"]["stages"][0]["trainer"]["env"] = job_env(
        host, job["plan"]["run_path"], **{GPUS_VARIABLE: "0,1"}
    )
    run = launched(host, job)
    first = read_jsonl(run.gpu)[0]
    assert first["stage"] == "rl" and [entry["gpu"] for entry in first["gpus"]] == [0, 1, 2]
    assert [entry["processes"] for entry in first["gpus"]] == [
        ["trainer-0"],
        ["trainer-1", "engine-0"],
        ["engine-0"],
    ]
    assert [entry["use"] for entry in first["gpus"]] == [0.97, 0.03, None]
    assert [entry["memory_gib"] for entry in first["gpus"]] == [1.0, 61.0, 0.0]
    assert "--id=0,1,2" in (tmp_path / "bin" / "calls").read_text()


def test_without_a_gpu_processes_are_sampled(host: Host, tmp_path: Path) -> None:
    """Goal: a run on the CPU has memory of each rank and engine, and asks no nvidia-smi. Red with one that is asked
    for no card, and with torchrun's own process as a rank."""
    smi = fake_smi(tmp_path / "bin")
    job = host.job(stage("rl", trainer(ENGINE_SEEN), engine(free_port())), host_env=smi)
    job["plan"]["stages"][0]["trainer"]["env"] = job_env(host, job["plan"]["run_path"])
    rows = read_jsonl(launched(host, job).gpu)
    assert all(row["gpus"] == [] for row in rows)
    names = {entry["name"] for row in rows for entry in row["processes"]}
    assert names <= {"engine-0", "trainer-0"} and "engine-0" in names
    memory = [entry["memory_gib"] for entry in rows[-1]["processes"] if entry["name"] == "engine-0"]
    assert memory and memory[0] > 0
    assert not (tmp_path / "bin" / "calls").exists()


def launched(host: Host, job: dict) -> RunDir:
    from tests.worker.stands import wait_for_end

    done = host.launch(job)
    assert done.returncode == 0, done.stderr
    run = RunDir(Path(job["plan"]["run_path"]))
    wait_for_end(run)
    assert events(run, "run_ended")[0]["state"] == "done"
    return run


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[RunDir, subprocess.Popen[bytes]]]:
    """A rank that computes."""
    run = RunDir(tmp_path / "runs" / "r1")
    run.path.mkdir(parents=True)
    marks = {**run_marks(run), WINDOW_VARIABLE: "rl-trainer", "LOCAL_RANK": "0"}
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"],
        env={**os.environ, **marks},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    yield run, child
    child.kill()
    child.wait()


def test_cpu_is_counted_since_the_last_sample(
    busy: tuple[RunDir, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the first sample knows no use, the next do. Red with all that a process ever used in the first."""
    run, _ = busy
    monkeypatch.setattr(usage_sampler, "INTERVAL_S", 0.0)
    sampler, of_stage = UsageSampler(run, print), stage("rl", trainer(""))
    used: list[float] = []
    while not used:
        sampler.sample(of_stage)
        rows = read_jsonl(run.gpu)
        used = [row["processes"][0]["cpu"] for row in rows if row["processes"][0]["cpu"]]
    assert rows[0]["processes"] == [{**rows[0]["processes"][0], "name": "trainer-0", "cpu": None}]


def test_an_nvidia_smi_that_fails_is_given_up(
    busy: tuple[RunDir, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: it is asked three times, one note says so, and processes are sampled on. Red without the bound."""
    run, _ = busy
    monkeypatch.setattr(usage_sampler, "INTERVAL_S", 0.0)
    monkeypatch.setenv("PATH", fake_smi(tmp_path / "bin", fails=True)["PATH"])
    notes: list[str] = []
    sampler = UsageSampler(run, notes.append)
    of_stage = stage("rl", trainer("", env={GPUS_VARIABLE: "0"}))
    for _ in range(5):
        sampler.sample(of_stage)
    assert len((tmp_path / "bin" / "calls").read_text().splitlines()) == 3
    assert len(notes) == 1 and "nvidia-smi" in notes[0]
    assert [len(row["processes"]) for row in read_jsonl(run.gpu)] == [1] * 5


def test_a_month_of_samples_is_small() -> None:
    """Goal: of 1 kB lines a month holds 10 MiB at most, and the first hour one every 5 s. Red with 5 s for ever."""
    size, at_s, first_hour = 0, 0.0, 0
    while at_s < 30 * 86400:
        first_hour += at_s < 3600
        size += 1000
        at_s += interval_s(size)
    assert size < 10 << 20 and first_hour == 720


def test_what_nvidia_smi_says_is_read() -> None:
    """Goal: lines of other kinds are left out. Red with the first line taken for a card."""
    lines = ["No devices were found", "0, 100, 5, 10", "1, [N/A], [N/A], [N/A]", "2, 1"]
    assert read_usage(lines) == (
        GpuUsage(index=0, use=1.0, memory_mib=5, memory_total_mib=10),
        GpuUsage(index=1, use=None, memory_mib=None, memory_total_mib=None),
    )
    assert json.dumps(read_usage(["0, 250, 1, 1"])[0].use) == "1.0"
