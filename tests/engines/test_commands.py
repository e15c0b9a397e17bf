"""The real engines' command lines, word for word; each was seen to be taken by its server, on a CPU."""

import dataclasses
from typing import Any, cast

import pytest

from base_config import VLLM, DiskSync, Embedded, LoraConfig, LoraSync, SGLang
from rollouts.config import EngineConfig
from rollouts.engines.command_lines import engine_argv, engine_devices, engine_env, ready_url
from tests.example_config import example_config, like_example, replace_at, sglang

DISK = DiskSync(on_tmpfs=False)


def engine_of(kind: type = SGLang, **changes: Any) -> EngineConfig:
    """An engine of that kind, with the example's settings but for `changes`."""
    if kind is SGLang:
        return sglang(**{"max_total_tokens": None, **changes})
    own = (
        {"requirements_file": "l.txt"}
        if kind is Embedded
        else {"requirements_file": "l.txt", "weight_sync": DISK}
    )
    more = {"tensor_parallel_size": 1} if kind is VLLM else {}
    return cast(
        EngineConfig, like_example(kind, example_config().engine, **{**own, **more, **changes})
    )


def line(
    engine: EngineConfig,
    device_type: Any,
    *,
    trust: bool = False,
    replica: int = 0,
    lora: LoraConfig | None = None,
) -> str:
    model = dataclasses.replace(example_config().model, trust_remote_code=trust, lora=lora)
    argv = engine_argv(
        engine,
        model,
        python="py",
        model_path="/m",
        device_type=device_type,
        seed=7,
        replica=replica,
    )
    return " ".join(argv)


def test_sglang_on_a_gpu() -> None:
    """Goal: every field that SGLang has is on its command line; nothing of a CPU's is. Red with one left out."""
    engine = engine_of(
        tensor_parallel_size=2, max_total_tokens=9000, sleep_while_training=True, replicas=2
    )
    assert line(engine, "cuda", trust=True, replica=1) == (
        "py -m rollouts.engines.sglang.launcher --model-path /m --host 127.0.0.1 --port 30181 --dtype float32"
        " --device cuda --tensor-parallel-size 2 --mem-fraction-static 0.5 --context-length 2048"
        " --max-total-tokens 9000 --max-running-requests 256 --random-seed 8 --log-level-http warning"
        " --sleep-on-idle --cuda-graph-max-bs-decode 256 --enable-memory-saver --trust-remote-code"
    )
    assert engine_env(engine, device_type="cuda", tree="/t") == {}
    assert "--max-total-tokens" not in line(engine_of(), "cuda")
    # no larger than what runs, nor than SGLang goes by itself
    for running, graphs in (24, 24), (512, 256):
        few = line(engine_of(max_running_requests=running), "cuda")
        assert f" --cuda-graph-max-bs-decode {graphs}" in few


def test_sglang_on_a_cpu() -> None:
    """Goal: the flags and variables with which SGLang runs without a GPU. Red with the stubs left off PYTHONPATH."""
    engine = engine_of(max_total_tokens=4096)
    assert line(engine, "cpu").startswith(
        "py -m rollouts.engines.sglang.cpu_launcher --model-path /m "
    )
    assert line(engine, "cpu").endswith(
        "--sleep-on-idle --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph"
        " --disable-overlap-schedule --enable-deterministic-inference"
    )
    assert engine_env(engine, device_type="cpu", tree="/t") == {
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": "/t/rollouts/engines/sglang/cpu_stubs",
    }


def test_sglang_with_adapters_alone() -> None:
    """Goal: room for one adapter of the config's rank and layers, by bare names; the kernels of a CPU only there. Red
    with the rank left out: SGLang wants it.
    """
    engine = engine_of(max_total_tokens=4096, weight_sync=LoraSync(on_tmpfs=False))
    lora = LoraConfig(rank=8, alpha=16.0, dropout=0.0, target_modules="all-linear", init_seed=0)
    flags = "--enable-lora --max-lora-rank 8 --max-loras-per-batch 1 --lora-target-modules q_proj k_proj"
    assert line(engine, "cpu", lora=lora).endswith(
        f" {flags} v_proj o_proj gate_proj up_proj down_proj --lora-backend torch_native"
    )
    named = replace_at(
        lora, "target_modules", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "k_proj"]
    )
    assert line(engine, "cuda", lora=named).endswith(f" {flags}")
    assert "lora" not in line(engine_of(), "cuda", lora=lora)


def test_vllm() -> None:
    """Goal: log-probs at the sampling temperature, token ids in and out, our keys, the memory's share. Red with
    --logprobs-mode left out."""
    engine = engine_of(VLLM, tensor_parallel_size=4)
    assert line(engine, "cuda") == (
        "py -m vllm.entrypoints.cli.main serve /m --host 127.0.0.1 --port 30180 --dtype float32"
        " --tensor-parallel-size 4 --gpu-memory-utilization 0.5 --max-model-len 2048 --max-num-seqs 256 --seed 7"
        " --logprobs-mode processed_logprobs --enable-scale-out --enable-prompt-tokens-details"
        " --middleware rollouts.engines.vllm.guard.KeyGuard --disable-uvicorn-access-log"
    )
    assert engine_env(engine, device_type="cuda", tree="/t") == {"VLLM_SERVER_DEV_MODE": "1"}
    assert "--enforce-eager" in line(engine, "cpu") and "--gpu-memory-utilization" not in line(
        engine, "cpu"
    )
    assert "VLLM_CPU_KVCACHE_SPACE" in engine_env(engine, device_type="cpu", tree="/t")


@pytest.mark.parametrize("kind", [Embedded, SGLang, VLLM])
def test_what_all_kinds_share(kind: type) -> None:
    """Goal: loopback, a replica's own port, devices in slices, no key. Red with 0.0.0.0, and with one port for all."""
    size = 1 if kind is Embedded else 2
    wide = {} if kind is Embedded else {"tensor_parallel_size": size}
    engine = engine_of(kind, gpu_ranks=[4, 5, 6, 7][: 2 * size], replicas=2, **wide)
    for replica in range(2):
        text = line(engine, "cuda", replica=replica)
        assert f"--host 127.0.0.1 --port {30180 + replica} " in text and "key" not in text.replace(
            "KeyGuard", ""
        )
        assert ready_url(engine, replica).startswith(f"http://127.0.0.1:{30180 + replica}/")
    assert [engine_devices(engine, replica) for replica in range(2)] == (
        [[4], [5]] if kind is Embedded else [[4, 5], [6, 7]]
    )
