"""The real servers that the contract runs against, and what they are known to do differently, each with its reason."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from base_config import VLLM, DiskSync, Embedded, LoraConfig, LoraSync
from rollouts.config import EngineConfig
from rollouts.engines.command_lines import engine_argv, engine_env, engine_url
from rollouts.training.inference.client import EngineClient
from rollouts.training.weight_sync import SGLangEngine, VLLMEngine
from tests.engines.environments import interpreter
from tests.engines.serving import CONTEXT, REPOSITORY, ROWS_MAX, await_health, start
from tests.example_config import example_config, like_example, sglang
from tests.ports import free_port

# A host that reaches the world through a proxy, which cannot reach the host's own servers. Red with SGLang's requests
# to itself left to it: it was never ready.
PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTP_PROXY")} | {
    "no_proxy": "",
    "NO_PROXY": "",
}


@dataclass(frozen=True)
class Facts:
    """Where servers differ by what their source says they do. Everything else is the same case for all."""

    client: type[EngineClient]
    model: str  # of serving.config_of: input and output embeddings tied, as small models have them, where that works
    context_spare: int  # of the context's tokens, how many stay unused
    prefix_cache: bool  # whether a prompt seen before is reported as cached
    filtered_logprobs: bool  # whether log-probs can be had beside top_k, top_p and min_p
    min_p: bool
    frozen_flush: (
        bool  # whether the prefix cache may be flushed below requests that are frozen in place
    )


FACTS = {
    "embedded": Facts(
        client=SGLangEngine,
        model="qwen2-wide-tied",
        context_spare=0,
        prefix_cache=False,  # prompts that arrive together share a prefill; nothing outlives a request
        filtered_logprobs=True,
        min_p=True,
        frozen_flush=False,
    ),
    "sglang": Facts(
        client=SGLangEngine,
        model="qwen2-wide-tied",
        context_spare=2,  # scheduler.py: max_req_len = context - 1, and max_new_tokens <= max_req_len - prompt - 1
        prefix_cache=True,
        filtered_logprobs=True,
        min_p=False,  # layers/sampler.py asserts that there is none once seeds are heeded, and the process ends
        frozen_flush=False,
    ),
    "vllm": Facts(
        client=VLLMEngine,
        model="qwen2-wide",  # tied, a reload on a CPU leaves the output head as it was (0.32.0; vllm#51665 is alike)
        context_spare=0,
        prefix_cache=True,
        filtered_logprobs=False,  # v1/sample/sampler.py takes "processed" log-probs after the filters
        min_p=True,
        frozen_flush=False,
    ),
}


@dataclass(frozen=True)
class Running:
    """A server that runs, and what it serves."""

    kind: str
    url: str
    facts: Facts
    old: Path  # what it started with
    new: Path  # the same architecture, other weights
    broken: Path  # the same again, its file cut short
    first_version: str  # what it calls the weights that it started with

    def client(self) -> EngineClient:
        return self.facts.client(self.url, timeout_s=300)


@contextmanager
def running(
    kind: str, old: Path, new: Path, broken: Path, *, lora: LoraConfig | None = None
) -> Iterator[Running]:
    """A server of this kind over `old`, started as a run starts it; ended afterwards. `lora`: for adapters alone."""
    example = example_config()
    model = dataclasses.replace(example.model, lora=lora)
    sizes = {
        "sglang_port": free_port(),
        "context_length": CONTEXT,
        "max_running_requests": ROWS_MAX,
    }
    engine: EngineConfig
    if kind == "sglang":
        sync = DiskSync(on_tmpfs=False) if lora is None else LoraSync(on_tmpfs=False)
        engine = sglang(max_total_tokens=65_536, weight_sync=sync, **sizes)
    else:
        own = {"requirements_file": "l.txt", "tensor_parallel_size": 1} if kind == "vllm" else {}
        engine = like_example(VLLM if kind == "vllm" else Embedded, example.engine, **own, **sizes)
    python = sys.executable if kind == "embedded" else interpreter(kind)
    argv = engine_argv(engine, model, python=python, model_path=str(old), device_type="cpu", seed=0)
    env = {**engine_env(engine, device_type="cpu", tree=str(REPOSITORY)), **PROXY}
    process = start(list(argv), env)
    facts, url = FACTS[kind], engine_url(engine)
    try:
        await_health(url, process, facts.client.ready_route)
        first = anyio.run(facts.client(url).model_info)["weight_version"]
        yield Running(kind, url, facts, old, new, broken, first)
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """It has processes of its own, which end with it when it is asked; what is left after a while is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
