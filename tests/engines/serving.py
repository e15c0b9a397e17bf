"""What engine tests share: tiny models on disk, real server processes over them, and small words for talking to one."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.ports import free_port
from tests.training.process_nursery import has_ended, shared

REPOSITORY = Path(__file__).parents[2]
VOCAB = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", " ", ".", "?", "!"]
EOS = 1
CONTEXT = 2048
START_TIMEOUT_S = 400.0  # vLLM, on a machine where much else runs
ROWS_MAX = 24
LOGPROB_TOLERANCE = 1e-5
PROMPT = [2, 3, 4, 5, 6, 7, 8]
LONG_TOKENS = 700
# runs for a second or so: something to pause and abort
LONG = {"max_new_tokens": LONG_TOKENS, "ignore_eos": True}


def config_of(kind: str) -> Any:  # noqa: PLR0911 — one for each kind
    """A config of about 100K parameters over VOCAB."""
    sizes = {
        "vocab_size": len(VOCAB),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    if kind.startswith("qwen2-wide"):  # heads of 32, which vLLM's attention on a CPU needs at least
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if kind in ("qwen2-tied", "qwen2-wide-tied", "qwen2-wide"):
        return Qwen2Config(**sizes, tie_word_embeddings=kind.endswith("tied"))
    if kind == "llama":
        return LlamaConfig(**sizes, tie_word_embeddings=False)
    if kind == "mistral-sliding":
        return MistralConfig(**sizes, sliding_window=8)
    if kind == "qwen2-mixed":  # one full layer, one sliding
        return Qwen2Config(**sizes, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    if kind == "qwen3":
        return Qwen3Config(**sizes, head_dim=16)
    if kind == "gemma":
        return GemmaConfig(**sizes, head_dim=16)
    assert kind == "gpt2", kind
    return GPT2Config(
        vocab_size=len(VOCAB), n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, eos_token_id=EOS
    )


def make_model(
    kind: str, path: Path, *, seed: int, tokenizer: bool = True, spread: float = 4.0
) -> Path:
    """A random model in `path`, its weights scaled up by `spread` so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread if "embed" in name or "lm_head" in name else 2.0)
    model.save_pretrained(path)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per character."""
    core = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(VOCAB)}, unk_token="?")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def embedded_argv(model_path: Path, port: int, **flags: str) -> list[str]:
    argv = [
        sys.executable,
        "-m",
        "rollouts.engines.embedded",
        "--model-path",
        str(model_path),
        "--port",
        str(port),
    ]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", value]
    return argv


def start(argv: list[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """The server process, with `more` in its environment, in a group of its own; what it says: `stderr_of(process)`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(more or {})}
    errors = tempfile.NamedTemporaryFile("w", suffix=".stderr", delete=False)  # noqa: SIM115 - outlives this function
    process = subprocess.Popen(
        argv,
        cwd=REPOSITORY,
        env=environment,
        stdout=errors,
        stderr=errors,
        text=True,
        process_group=0,
    )
    process.stderr_path = Path(errors.name)  # type: ignore[attr-defined]
    return process


@contextmanager
def serving(
    model_path: Path, *, environment: Mapping[str, str] | None = None, **flags: str
) -> Iterator[str]:
    """The base URL of an embedded engine over `model_path`, ended afterwards."""
    port = free_port()
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        argv = embedded_argv(model_path, port, **flags)[3:]
        pid = shared().start(
            "rollouts.engines.embedded", argv, Path(log.name), environment=environment
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_healthy(url, lambda: has_ended(pid), lambda: Path(log.name).read_text())
            yield url
        finally:
            shared().kill(pid)


def await_health(url: str, process: subprocess.Popen[str], route: str = "/health") -> None:
    wait_until_healthy(url, lambda: process.poll() is not None, lambda: stderr_of(process), route)


def wait_until_healthy(
    url: str, ended: Callable[[], bool], said: Callable[[], str], route: str = "/health"
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(timeout=60, verify=False) as client:
        while time.monotonic() < deadline:
            assert not ended(), f"the server ended: {said()}"
            try:
                if client.get(url + route).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
    raise AssertionError(f"not healthy after {START_TIMEOUT_S:g} s: {said()}")


def stderr_of(process: subprocess.Popen[str]) -> str:
    return process.stderr_path.read_text()  # type: ignore[attr-defined,no-any-return]


def logprobs_of(
    model: Any, prompt: list[int], output: list[int], temperature: float
) -> list[float]:
    """What a trainer computes: one full forward over prompt + output, log softmax(logits / T), in fp32."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *output]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None])
    return [float(value) for value in chosen[:, 0]]


# --- a running engine -------------------------------------------------------------------------------------------------


@dataclass
class Engine:
    """A running server, and what it serves."""

    url: str
    client: httpx.Client
    old: Path  # what it started with
    new: Path  # the same architecture, other weights
    model: Any  # `old`, for reference numbers

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.client.post(self.url + path, json={} if body is None else body)

    def generate(self, input_ids: Any, *, logprob: bool = True, **params: Any) -> Any:
        answer = self.post(
            "/generate",
            {"input_ids": input_ids, "sampling_params": params, "return_logprob": logprob},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def info(self) -> dict[str, Any]:
        return self.client.get(self.url + "/model_info").json()

    def state(self) -> dict[str, Any]:
        return self.client.get(self.url + "/server_info").json()["internal_states"][0]


def tokens(answer: Any) -> list[int]:
    return [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]]


def logprobs(answer: Any) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def in_background(function: Callable[[], Any]) -> "tuple[threading.Thread, list[Any]]":
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results


def start_long(engine: Engine, **body: Any) -> "tuple[threading.Thread, list[Any]]":
    """A long request in the background, known to be running, and held where it is until the engine is continued."""

    def ask() -> Any:
        return engine.post(
            "/generate",
            {"input_ids": PROMPT, "sampling_params": LONG, "return_logprob": True, **body},
        ).json()

    thread, results = in_background(ask)
    wait_for(lambda: engine.state()["running"] > 0)
    assert engine.post("/pause_generation", {"mode": "in_place"}).status_code == 200
    assert engine.state()["running"] == 1, "it was done before it was held"
    return thread, results
