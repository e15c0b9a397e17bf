"""How the server process starts, fails to start, and ends. Real processes."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from base_config import DiskSync, Embedded, ModelConfig
from rollouts.engines.command_lines import engine_argv, engine_url
from tests.engines.serving import (
    REPOSITORY,
    await_health,
    embedded_argv,
    make_model,
    start,
    stderr_of,
)
from tests.ports import free_port
from tests.training.process_nursery import shared


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"), seed=0, tokenizer=False)


def configs(port: int) -> tuple[Embedded, ModelConfig]:
    engine = Embedded(
        hosts=None,
        requirements_file=None,
        gpu_ranks=[0],
        sglang_port=port,
        replicas=1,
        mem_fraction=0.5,
        context_length=2048,
        max_running_requests=3,
        weight_sync=DiskSync(on_tmpfs=False),
        restarts_max=0,
    )
    model = ModelConfig(
        name="m",
        init="pretrained",
        init_seed=0,
        dtype="bfloat16",
        compile=False,
        activation_checkpointing=False,
        lora=None,
        trust_remote_code=False,
    )
    return engine, model


def one_error_line(logs: Path, argv: list[str]) -> str:
    """The server's last word: it ends by itself, non-zero, with one line that starts with `error:`, no traceback."""
    log = logs / "engine.log"
    assert shared().wait(shared().start("rollouts.engines.embedded", argv[3:], log)) == 1
    text = log.read_text()
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: embedded engine: ")]
    assert len(lines) == 1, text
    return lines[0]


def test_the_command_line_serves_what_the_config_says(model_path: Path) -> None:
    """Goal: `engine_argv` starts a server at `engine_url` with the config's limit and dtype, which ends with 0 on
    SIGTERM, also while it decodes. Red with --max-running-requests left out.
    """
    engine, model = configs(free_port())
    argv = engine_argv(
        engine, model, python=sys.executable, model_path=str(model_path), device_type="cpu", seed=4
    )
    process = start(list(argv))
    try:
        await_health(engine_url(engine), process)
        info = httpx.get(engine_url(engine) + "/server_info", timeout=60).json()
        assert (info["max_running_requests"], info["dtype"], info["random_seed"]) == (
            3,
            "bfloat16",
            4,
        )
        body = {
            "input_ids": [2, 3],
            "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        }
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                engine_url(engine) + "/generate", json=body, timeout=httpx.Timeout(60, read=0.3)
            )
        answer = httpx.post(
            engine_url(engine) + "/generate", json={"input_ids": [2], "text": None}, timeout=200
        ).json()
        assert "text" not in answer  # the directory has no tokenizer
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == 0
    finally:
        process.kill()


def test_unhealthy_until_the_model_is_loaded(model_path: Path) -> None:
    """Goal: while it loads, every route answers 503 rather than refusing or hanging. Red with /health always 200."""
    port = free_port()
    process = start(embedded_argv(model_path, port))
    seen = []
    try:
        with httpx.Client(timeout=60) as client:
            while not seen or seen[-1] != 200:
                assert process.poll() is None, stderr_of(process)
                time.sleep(0.02)
                try:
                    seen.append(client.get(f"http://127.0.0.1:{port}/health").status_code)
                except httpx.ConnectError:
                    continue
    finally:
        process.terminate()
        process.wait(timeout=200)
    assert set(seen) == {503, 200}


def test_a_port_in_use(model_path: Path, tmp_path: Path) -> None:
    """Goal: one line names the port, at once. Red with the port bound by uvicorn."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in one_error_line(tmp_path, embedded_argv(model_path, port))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """Goal: the missing directory is named and nobody asks a hub for it. Red with from_pretrained's own message."""
    line = one_error_line(tmp_path, embedded_argv(tmp_path / "nowhere", free_port()))
    assert str(tmp_path / "nowhere") in line and "no such directory" in line


def test_a_directory_without_weights(tmp_path: Path) -> None:
    """Goal: a directory that is no model, or has a config alone, ends the server too, naming it and what it lacks.

    Red with the model thread's error not handed to the exit code.
    """
    assert "has no config.json" in one_error_line(tmp_path, embedded_argv(tmp_path, free_port()))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    line = one_error_line(tmp_path, embedded_argv(tmp_path, free_port()))
    assert str(tmp_path) in line and "cannot be loaded" in line


def test_cuda_where_there_is_none(model_path: Path, tmp_path: Path) -> None:
    """Goal: --device cuda without a GPU says so in a line."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "--device" in one_error_line(
        tmp_path, embedded_argv(model_path, free_port(), device="cuda")
    )


def test_launch_needs_the_standard_library_only() -> None:
    """Goal: the control side plans without torch or starlette. Red with an import of the server in launch.py."""
    slow = {"torch", "transformers", "starlette", "uvicorn", "httpx"}
    code = f"import sys, rollouts.engines.command_lines; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_engine_argv_is_pure_and_complete() -> None:
    """Goal: every field of EngineConfig that the embedded engine has is in the command line. Red with one left out."""
    engine, model = configs(31000)
    argv = engine_argv(engine, model, python="py", model_path="/m", device_type="cuda", seed=7)
    flags = dict(zip(argv[3::2], argv[4::2], strict=True))
    assert argv[:3] == ("py", "-m", "rollouts.engines.embedded")
    assert flags == {
        "--model-path": "/m",
        "--host": "127.0.0.1",
        "--port": "31000",
        "--dtype": "bfloat16",
        "--device": "cuda",
        "--context-length": "2048",
        "--max-running-requests": "3",
        "--mem-fraction-static": "0.5",
        "--random-seed": "7",
    }
