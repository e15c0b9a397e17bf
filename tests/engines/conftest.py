"""The engines that tests run against: `engine`, the embedded one by its routes; `served`, any server by its client."""

from collections.abc import Iterator

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.contract_servers import FACTS, Running, running
from tests.engines.serving import ROWS_MAX, Engine, make_model, serving


@pytest.fixture(scope="session", params=["embedded:qwen2-tied", "embedded:llama"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    kind = request.param.split(":")[1]
    root = tmp_path_factory.mktemp(kind)
    old, new = make_model(kind, root / "old", seed=0), make_model(kind, root / "new", seed=1)
    with (
        serving(old, max_running_requests=str(ROWS_MAX)) as url,
        httpx.Client(timeout=200) as client,
    ):
        yield Engine(
            url,
            client,
            old,
            new,
            AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32).eval(),
        )


@pytest.fixture(autouse=True)
def _as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did: nothing runs, nothing is paused, the old weights serve."""
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        engine.post("/abort_request", {"abort_all": True})
        engine.post("/continue_generation")
        if engine.info()["weight_version"] != "default":
            body = {"model_path": str(engine.old), "weight_version": "default"}
            assert engine.post("/update_weights_from_disk", body).status_code == 200


@pytest.fixture(
    scope="module", params=["embedded", "sglang", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One server of each kind for the whole contract: SGLang takes half a minute to start, and 2.4 GB."""
    root, model = tmp_path_factory.mktemp(request.param), FACTS[request.param].model
    old, new, broken = (
        make_model(model, root / name, seed=s) for s, name in enumerate(("old", "new", "broken"))
    )
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with running(request.param, old, new, broken) as server:
        yield server
