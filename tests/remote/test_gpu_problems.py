"""What a CUDA host may lack or be in, rule by rule; and the script that asks it, with a stand-in nvidia-smi."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from rollouts.config import DiskSync, TensorSync
from rollouts.machine.nvidia_smi import Gpu, GpuProcess
from rollouts.remote.host import gpus
from rollouts.remote.host.facts import HostFacts, gather_facts, parse_facts
from rollouts.remote.host.gpus import CudaHost
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.plan import make_plan
from tests.example_config import example_config, replace_at
from tests.remote.hosts import tool_directory
from tests.remote.test_plan import CODE, CUDA, FACTS, H200, HALF, LOCK, SECOND, SGLANG, plan_for

UUID = "GPU-52a3a85d-3c55-ca3a-a955-82c69ed360fc"
GEFORCE = dataclasses.replace(
    H200, name="NVIDIA GeForce RTX 4090", memory_total_mib=24564, memory_free_mib=24080
)
LOCK_13 = {"code": {"engine_requirements": f"{LOCK}nvidia-nccl-cu13==2.29.7\n"}}
ENGINE: dict[str, Any] = {**CUDA, **HALF, **SGLANG, **LOCK_13}
SHM = {"engine__weight_sync": DiskSync(on_tmpfs=True), "model__name": "Qwen/Qwen2.5-1.5B-Instruct"}
TENSOR: dict[str, Any] = {**CUDA, "engine__weight_sync": TensorSync(bucket_mib=256)}
GROWING = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def gpu(**changes: Any) -> dict[str, Any]:
    return {"gpus": (dataclasses.replace(H200, **changes),)}


def cuda(**changes: Any) -> dict[str, Any]:
    return {"cuda": CudaHost(**changes)}


PROBLEMS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "a card fallen off the bus",
        {**CUDA, "facts": gpu(memory_total_mib=0, memory_free_mib=0, unreadable="[Unknown Error]")},
        ["GPU 0 cannot be read", "memory [Unknown Error]", "Xid"],
    ),
    (
        "a lost card that told its size",
        {**CUDA, "facts": gpu(unreadable="[GPU requires reset]")},
        ["GPU 0 cannot be read"],
    ),
    (
        "MIG",
        {**CUDA, "facts": gpu(mig="Enabled")},
        ["GPU 0 is split by MIG", "first slice", "nvidia-smi -i 0 -mig 0"],
    ),
    (
        "prohibited",
        {**CUDA, "facts": gpu(compute_mode="Prohibited")},
        ["closed to compute processes", "-c DEFAULT"],
    ),
    (
        "exclusive and colocated",
        {**CUDA, "facts": gpu(compute_mode="Exclusive_Process")},
        [
            "one process at a time",
            "trainer and engine on one card: target.gpu_ranks=[0], engine.gpu_ranks=[0]",
        ],
    ),
    (
        "a scheduler's other card",
        {**CUDA, "facts": cuda(visible_devices="2,3")},
        ["other GPUs than [0]", "CUDA_VISIBLE_DEVICES='2,3'", "target.gpu_ranks=[0]"],
    ),
    ("no card given", {**CUDA, "facts": cuda(visible_devices="")}, ["other GPUs than [0]"]),
    (
        "a slice given",
        {**CUDA, "facts": cuda(visible_devices="MIG-377e0049-554c")},
        ["other GPUs than [0]"],
    ),
    (
        "the engine's CUDA",
        {**ENGINE, "facts": {"driver": "570.86.15"}},
        [
            "driver 570.86.15 is too old for the engine's",
            "pins torch for CUDA 13",
            "driver 580",
            "cuda-compat-13-0",
        ],
    ),
    (
        "no cuda-compat for GeForce",
        {**ENGINE, "facts": {"driver": "550.1", "gpus": (GEFORCE,)}},
        ["NVIDIA GeForce RTX 4090", "for data-centre cards alone", "engine=Embedded(...)"],
    ),
    (
        "the trainer's CUDA",
        {**CUDA, "host__torch_build": "cu130", "facts": {"driver": "550.1"}},
        [
            "too old for the trainer's environment",
            "host.torch_build='cu130'",
            "set host.torch_build='auto'",
        ],
    ),
    (
        "too old for all",
        {**CUDA, "host__torch_build": "auto", "facts": {"driver": "470.223.02"}},
        ["driver 470.223.02 is too old for the trainer's environment", "driver 525.60 or newer"],
    ),
    (
        "glibc",
        {**CUDA, **HALF, **SGLANG, "facts": cuda(libc="glibc 2.31")},
        ["glibc 2.31 is too old", "2.34", "22.04"],
    ),
    (
        "musl",
        {**CUDA, "facts": cuda(libc="musl libc (x86_64)")},
        ["has no glibc", "glibc 2.28 or newer"],
    ),
    (
        "float32",
        {**CUDA, **SGLANG},
        ["model.dtype='float32' with engine=SGLang", "half precision", "model.dtype='bfloat16'"],
    ),
    (
        "no compiler",
        {**CUDA, **HALF, **SGLANG, "facts": cuda(compilers=("gcc", "cc"))},
        ["no C++ compiler", "engine=SGLang compile", "apt-get install g++"],
    ),
    (
        "compiled",
        {**CUDA, "model__compile": True, "facts": cuda(compilers=())},
        ["model.compile=True compile kernels"],
    ),
    (
        "no headers",
        {**CUDA, "model__compile": True, "facts": {"python_headers": ()}},
        ["Python 3.11.2 has no headers", "no Python.h beside /usr/bin/python3", "python3.11-dev"],
    ),
    (
        "Docker's /dev/shm",
        {**SHM, "facts": cuda(shm_total_mib=64, shm_free_mib=64)},
        [
            "/dev/shm is too small",
            "64 of 64 MiB free: Docker's default",
            "by the model's name",
            "--shm-size=14g",
        ],
    ),
    (
        "growing segments by the host's own files",
        {**TENSOR, "facts": cuda(allocator=(GROWING,))},
        [
            "sets PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' by itself",
            "have no handles",
            "weight_sync=DiskSync(...)",
        ],
    ),
    (
        "a model of unknown size",
        {**SHM, "model__name": "own/model", "facts": cuda(shm_total_mib=64, shm_free_mib=64)},
        ["/dev/shm is too small", "--shm-size=8g"],
    ),
    (
        "processes of others, unseen",
        {**CUDA, "facts": {**gpu(memory_free_mib=20_000)}},
        [
            "GPU 0 is busy",
            "a display, or processes outside this container",
            "--busy-ok starts beside it",
        ],
    ),
]


@pytest.mark.parametrize(
    ("changes", "texts"), [(c, t) for _, c, t in PROBLEMS], ids=[name for name, _, _ in PROBLEMS]
)
def test_each_problem(changes: dict[str, Any], texts: list[str]) -> None:
    """Goal: found before a byte is sent, with what was found, what is needed, and a fix. Red without its rule."""
    (problem,) = plan_for(**changes).problems
    missing = [text for text in texts if text not in problem.text()]
    assert not missing and problem.fix, problem.text()


COMPAT = {"host__env": {"LD_LIBRARY_PATH": "/usr/local/cuda-13.0/compat"}}
MPS = GpuProcess(gpu_uuid="GPU-a", pid=7, memory_mib=30, name="nvidia-cuda-mps-server")
FINE: list[tuple[str, dict[str, Any]]] = [
    ("GB10 reports no memory", {**CUDA, "facts": gpu(memory_total_mib=0, memory_free_mib=0, unreadable="[N/A]")}),
    ("exclusive, shared by MPS", {**CUDA, "facts": {**gpu(compute_mode="Exclusive_Process"), **cuda(mps=True)}}),
    ("exclusive, apart", {**CUDA, "engine__gpu_ranks": [1], "facts": {"gpus": (
        dataclasses.replace(H200, compute_mode="Exclusive_Process"), SECOND)}}),
    ("MIG on another card", {**CUDA, "facts": {"gpus": (H200, dataclasses.replace(SECOND, mig="Enabled"))}}),
    ("an MPS server alone", {**CUDA, "facts": {"gpu_processes": (MPS,)}}),
    ("this card given", {**CUDA, "facts": cuda(visible_devices="1, 0")}),
    ("given by the UUID's beginning", {**CUDA, "facts": {**gpu(uuid=UUID), **cuda(visible_devices=UUID[:12])}}),
    ("the engine's CUDA, newer", {**ENGINE, "facts": {"driver": "580.65.06"}}),
    ("cuda-compat", {**ENGINE, **COMPAT, "facts": {"driver": "535.1"}}),
    ("cu126 on 550", {**CUDA, "host__torch_build": "auto", "facts": {"driver": "550.54.14"}}),
    ("driver not told", {**ENGINE, "facts": {"driver": None}}),
    ("no compiler, nothing to compile", {**CUDA, "facts": {"python_headers": (), **cuda(compilers=())}}),
    ("room in /dev/shm", {**SHM, "facts": cuda(shm_total_mib=12000, shm_free_mib=12000)}),
    ("small /dev/shm, unused", {"facts": cuda(shm_total_mib=64, shm_free_mib=64)}),
    ("growing segments, disk", {**CUDA, "facts": cuda(allocator=(GROWING,))}),
    ("growing segments, unset by the config", {**TENSOR, "host__env": {GROWING[0]: ""}, "facts": cuda(
        allocator=(GROWING,))}),
    ("another setting of the allocator", {**TENSOR, "facts": cuda(allocator=((GROWING[0], "max_split_size_mb:64"),))}),
    ("a CPU run", {"facts": {**gpu(mig="Enabled"), **cuda(visible_devices="7", compilers=())}}),
]  # fmt: skip


@pytest.mark.parametrize(
    "changes", [changes for _, changes in FINE], ids=[name for name, _ in FINE]
)
def test_what_is_not_a_problem(changes: dict[str, Any]) -> None:
    """Goal: a rule stops at what it is about. Red with MPS's server counted as a user, MIG asked of all cards, a
    driver held against 580 for every build, any setting of the allocator refused."""
    assert plan_for(**changes).problems == ()


def test_a_busy_card_can_be_taken() -> None:
    """Goal: --busy-ok turns "busy" into a warning and no other problem; "[Not Found]" is named as no culprit. Red with
    every card's problem left out."""
    holder = GpuProcess(gpu_uuid="GPU-a", pid=0, memory_mib=400, name="[Not Found]")
    config = replace_at(example_config(), "target.device_type", "cuda")
    there: dict[str, Any] = {
        "target": "gpu-7",
        "run_id": "r1",
        "local_dir": "/x",
        "secrets_set": ["SET"],
    }
    facts = dataclasses.replace(FACTS, gpu_processes=(holder,))
    (problem,) = make_plan(config, facts, CODE, **there).problems
    assert (
        "GPU 0 is busy" in problem.message
        and "[Not Found]" not in problem.text()
        and "--busy-ok" in problem.fix
    )
    taken = make_plan(config, facts, CODE, **there, busy_ok=True)
    assert taken.problems == () and any(
        "--busy-ok takes it" in warning for warning in taken.warnings
    )
    broken = dataclasses.replace(
        facts, gpus=(dataclasses.replace(H200, unreadable="[Unknown Error]"),)
    )
    (problem,) = make_plan(config, broken, CODE, **there, busy_ok=True).problems
    assert "cannot be read" in problem.message


def test_warnings() -> None:
    """Goal: what may work is a warning: NCCL in a small /dev/shm, host.env's CUDA_VISIBLE_DEVICES, the public index on
    an older driver. Red with any of them silent."""
    plan = plan_for(
        **CUDA,
        target__gpu_ranks=[0, 1],
        host__torch_build="index",
        host__env={"CUDA_VISIBLE_DEVICES": "3"},
        facts={
            "gpus": (H200, SECOND),
            "driver": "550.1",
            **cuda(shm_total_mib=64, shm_free_mib=64),
        },
    )
    assert plan.problems == ()
    for words in (
        "NCCL keeps what 2 ranks",
        "host.env sets CUDA_VISIBLE_DEVICES",
        "the public index's torch",
    ):
        assert any(words in warning for warning in plan.warnings), plan.warnings


def test_cards_without_a_uuid_go_by_number() -> None:
    """Goal: a card whose UUID is not told is named by number, in nvidia-smi's order. Red with the UUID's cell taken."""
    launch = plan_for(**CUDA, facts=gpu(uuid="[N/A]")).launch
    assert launch is not None
    env = launch.stages[0].trainer.env
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("0", "PCI_BUS_ID")


# --- the script ---------------------------------------------------------------------------------------------------

# As the real one: refuses the whole query over one field that it does not know, and exits with 2.
NVIDIA_SMI = """#!/bin/sh
for asked; do
  case $asked in --query-gpu=*) fields=${asked#*=} ;; --query-compute-apps=*) exec cat "$0.apps" ;; esac
done
for field in $(echo "$fields" | tr , ' '); do
  case $field in @UNKNOWN@) echo "Field \\"$field\\" is not a valid field to query."; exit 2 ;; esac
done
line=
for field in $(echo "$fields" | tr , ' '); do
  case $field in
    index) cell=0 ;; uuid) cell=@UUID@ ;; name) cell='NVIDIA A100-SXM4-80GB' ;; memory.total) cell=81920 ;;
    memory.free) cell=81038 ;; driver_version) cell=470.182.03 ;; compute_mode) cell=Exclusive_Process ;;
    mig.mode.current) cell=Enabled ;; compute_cap) cell=8.0 ;;
  esac
  line="$line${line:+, }$cell"
done
echo "$line"
"""


def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> HostFacts:
    tools = tool_directory(tmp_path / "bin")
    for name, text in (
        ("nvidia-smi", program),
        ("nvidia-smi.apps", f"{UUID}, 7, 30, /usr/bin/x\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    return gather_facts(LocalTransport())


@pytest.mark.parametrize(
    ("unknown", "told"),
    [
        ("none", {"mig": "Enabled", "compute_capability": "8.0"}),
        ("compute_cap", {"mig": "Enabled"}),
        ("compute_cap|mig.mode.current", {}),
    ],
)
def test_an_older_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str, told: dict[str, str]
) -> None:
    """Goal: a field that this nvidia-smi does not know is left out, and no other. Red with one query: no card."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv(*GROWING)
    facts = ask(
        tmp_path, monkeypatch, NVIDIA_SMI.replace("@UNKNOWN@", unknown).replace("@UUID@", UUID)
    )
    (card,) = facts.gpus
    assert card == Gpu(
        index=0,
        uuid=UUID,
        name="NVIDIA A100-SXM4-80GB",
        memory_total_mib=81920,
        memory_free_mib=81038,
        compute_mode="Exclusive_Process",
        **told,  # type: ignore[arg-type]
    )
    assert (
        facts.driver == "470.182.03" and facts.gpu_problem == "" and facts.gpu_processes[0].pid == 7
    )
    assert facts.cuda.allocator == (GROWING,)
    assert facts.cuda.visible_devices == "3" and facts.cuda.machine == os.uname().machine
    assert (
        facts.cuda.compilers is not None
        and facts.python_headers is not None
        and "libc" in facts.cuda.libc
    )


def test_an_nvidia_smi_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: one that waits for a broken card costs its own time limit, and is named. Red without a limit."""
    impatient = gpus.SCRIPT.replace(f"timeout {gpus.NVIDIA_SMI_TIMEOUT_S} ", "timeout 0.2 ")
    monkeypatch.setattr(gpus, "SCRIPT", impatient)
    facts = ask(tmp_path, monkeypatch, "#!/bin/sh\nexec sleep 600\n")
    assert facts.gpus == () and facts.gpu_problem.startswith("nvidia-smi did not answer within")


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ("0, GPU-a, NVIDIA A100, [Unknown Error], [Unknown Error]", "cannot be read"),
        ("0, GPU-a, NVIDIA A100, [GPU is lost], [GPU is lost]", "cannot be read"),
        ("0, GPU-a, NVIDIA GB10, [N/A], [N/A]", ""),
        ("0, GPU-a, NVIDIA GB10, [Not Supported], [Not Supported]", ""),
        ("0, GPU-a, NVIDIA A100, [Insufficient Permissions], [Insufficient Permissions]", ""),
    ],
)
def test_words_in_place_of_memory(cells: str, problem: str) -> None:
    """Goal: what a card cannot tell is told from a card that is broken. Red with each counted as a free card."""
    facts = parse_facts([("home", "/h"), ("gpu", cells)])
    found = [found.message for found in plan_for(**CUDA, facts={"gpus": facts.gpus}).problems]
    assert (not found) if not problem else problem in found[0]
