"""Engines that weights are sent to: an embedded one, and the real SGLang on a CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.contract_servers import running
from tests.engines.serving import make_model, serving
from tests.weights.deliveries import LORA


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of one architecture, embeddings tied: what the engines start with, and what the trainer has."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model("qwen2-tied", root / name, seed=seed)
        for seed, name in enumerate(("old", "new"))
    }


@pytest.fixture(scope="session")
def embedded_url(models: dict[str, Path]) -> Iterator[str]:
    with serving(models["old"]) as url:
        yield url


@pytest.fixture(scope="package")
def sglang_url(models: dict[str, Path]) -> Iterator[str]:
    """One server for all tests of it: it takes half a minute to start. It has room for an adapter of LORA's kind."""
    with running("sglang", models["old"], models["new"], models["new"], lora=LORA) as server:
        yield server.url


@pytest.fixture(params=["embedded", "sglang"])
def url(request: pytest.FixtureRequest) -> str:
    """Of an engine of each kind, serving whatever the test before left."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
