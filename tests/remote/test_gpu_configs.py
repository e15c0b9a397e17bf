"""The shipped GPU configs, planned: on a host with GPUs the exact command lines, on one without the one reason."""

import dataclasses
from pathlib import Path

import pytest

from base_config import load_config
from rollouts.remote.plan import Plan, make_plan
from rollouts.remote.repository import read_code
from tests.remote.test_plan import FACTS, H200, torchrun

ROOT = Path(__file__).resolve().parent.parent.parent
GPU_CONFIGS = ["01_debug_sft_rl", "nanochat_sft_rl", "rl_math", "sft_openwebtext", "sft_qwen"]
FOUR = tuple(dataclasses.replace(H200, index=index, uuid=f"GPU-{index}") for index in range(4))


def plan(name: str, *, gpus: tuple = FOUR) -> Plan:
    config = load_config(ROOT / "configs" / f"{name}.py")
    facts = dataclasses.replace(FACTS, gpus=gpus, driver="580.65.06")
    return make_plan(
        config,
        facts,
        read_code(ROOT, config),
        target="gpu-7",
        run_id="r1",
        local_dir="/here",
        secrets_set=[],
    )


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_without_a_gpu_that_alone_is_the_reason(name: str) -> None:
    """Goal: a host without a GPU is refused for that, with the plan still shown. Red with the device check left out."""
    refused = plan(name, gpus=())
    (problem,) = refused.problems
    assert (
        "gpu-7 has 0 GPUs; this config needs" in problem.text()
        and "choose another --remote" in problem.text()
    )
    assert refused.launch is not None and refused.steps
    assert plan(name).problems == ()


def test_the_debug_config_in_full() -> None:
    """Goal: what `--plan` shows of the real engine and of torchrun, word for word; no key in it. Red with a flag left
    out of either command line."""
    shown = plan("01_debug_sft_rl")
    assert shown.launch is not None
    trainer, engine = (
        f"{environment.path}/bin/python" for environment in shown.launch.environments
    )
    run = "/home/u/.rollouts/runs/r1"
    module = "-m rollouts.worker.trainer"
    lines = [step.what for step in shown.steps if step.what.startswith(("sft: ", "rl: "))]
    assert lines == [
        f"sft: trainer: {torchrun(trainer, run, 'sft', 1)} {module} --run-dir {run} --stage sft",
        f"rl: engine-0: {engine} -m rollouts.engines.sglang.launcher --model-path {run}/checkpoints/sft/latest"
        " --host 127.0.0.1 --port 30180 --dtype bfloat16 --device cuda --tensor-parallel-size 1"
        " --mem-fraction-static 0.35 --context-length 2048 --max-running-requests 256 --random-seed 42"
        " --log-level-http warning --sleep-on-idle --cuda-graph-max-bs-decode 256",
        f"rl: trainer: {torchrun(trainer, run, 'rl', 1)} {module} --run-dir {run} --stage rl --engine-url http://127.0.0.1:30180",
    ]
    rl = shown.launch.stages[1]
    assert (
        rl.trainer.env["CUDA_VISIBLE_DEVICES"] == "GPU-0"
        and rl.engines[0].env["CUDA_VISIBLE_DEVICES"] == "0"
    )
    assert "SGLANG_USE_CPU_ENGINE" not in rl.engines[0].env
    no_deps = [line.split("==")[0] for line in shown.launch.environments[1].requirements_no_deps]
    # they ask for a package that the public index lacks a wheel of
    assert no_deps == ["flashinfer-python", "sglang"]


def test_two_replicas_beside_two_ranks() -> None:
    """Goal: rl_math's devices are split between trainer and replicas; the router sees none. The trainer's are named by
    UUID, SGLang's, which reads integers, by number in nvidia-smi's order. Red with replicas on all engine devices, and
    without CUDA_DEVICE_ORDER."""
    launch = plan("rl_math").launch
    assert launch is not None
    (rl,) = launch.stages
    assert [engine.env["CUDA_VISIBLE_DEVICES"] for engine in rl.engines] == ["2", "3", ""]
    assert rl.trainer.env[
        "CUDA_VISIBLE_DEVICES"
    ] == "GPU-0,GPU-1" and "--nproc-per-node 2" in " ".join(rl.trainer.argv)
    specs = [*rl.engines, rl.trainer]
    assert {spec.env["CUDA_DEVICE_ORDER"] for spec in specs} == {"PCI_BUS_ID"}
    assert [spec.env["ROLLOUTS_GPUS"] for spec in specs] == ["2", "3", "", "0,1"]
    assert any(line.startswith("math-verify") for line in launch.environments[0].requirements)


def test_the_lock_goes_into_the_record() -> None:
    """Goal: a run directory says which lock its engine had; one without an engine has none. Red with it left out."""
    lock = (ROOT / "requirements" / "sglang-cuda.txt").read_text()
    for name, text in (("rl_math", lock), ("sft_qwen", "")):
        record = read_code(ROOT, load_config(ROOT / "configs" / f"{name}.py")).record()
        assert record["code/engine_requirements.txt"] == text
