"""A trainer's weight sync, of each kind that the embedded engine takes, while its engine dies or is cut off."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rollouts.training.inference.resilient import Recovered, resilient
from rollouts.training.weight_sync import SGLangEngine, WeightSyncError
from rollouts.training.weight_transfer.buckets import BucketTransfer
from rollouts.training.weight_transfer.disk import DiskTransfer
from rollouts.training.weight_transfer.sync import WeightSync
from rollouts.training.weight_transfer.tensor import SharedMemoryLink
from tests.engines.lives import WAIT_S, Server
from tests.engines.proxy import Proxy, proxy
from tests.training.tiny import tiny_backend, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.anyio
PROMPT = [2, 3, 4]
ROUTES = {
    "disk": ("/pause_generation", "/update_weights_from_disk", "/generate"),  # the last: what proves it
    "tensor": (
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/flush_cache",
        "/generate",
    ),
}
CASES = [(kind, *case) for kind in ROUTES for case in itertools.product(ROUTES[kind], ["reset", "killed"])]
CASES += [("disk", "/flush_cache", "restarted"), ("tensor", "/update_weights_from_tensor", "restarted")]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(seed=1).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    made = Server(directory, tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture
def between(server: Server) -> Iterator[Proxy]:
    server.await_health()
    with proxy(server.url) as made:
        yield made


def transfer_of(kind: str, backend: Any, directory: Path) -> Any:
    if kind == "disk":
        return DiskTransfer(backend, directory)
    return BucketTransfer(backend, SharedMemoryLink(tensor_parallel_size=1), dtype=None, bucket_bytes=4096)


def restart(server: Server) -> None:
    """Dead and back before the call gets through: the new life refuses it, or denies the weights."""
    server.replace()
    server.await_health()


def train(backend: Any) -> None:
    """What stands for a step: other weights."""
    with torch.no_grad():
        for parameter in backend.model.parameters():
            parameter.mul_(1.25)


@pytest.mark.parametrize(("kind", "route", "fault"), CASES)
async def test_a_sync_is_done_again(
    server: Server, between: Proxy, tmp_path: Path, *, kind: str, route: str, fault: str
) -> None:
    """Goal: whichever call of a sync, or of its proof, breaks or finds its engine dead, the engine serves the trainer's
    weights of now in the end, proven; and gets them again when it dies later. Red without receive_again, with the
    start's weights for what comes back, and with a session left open whose opening was not answered."""
    backend, recovered = tiny_backend(tmp_path), list[Recovered]()
    options: dict[str, Any] = {"reruns_max": 3, "recover_timeout_s": WAIT_S, "on_recovered": recovered.append}
    engines = resilient([SGLangEngine(between.url)], **options)
    sync = WeightSync(backend, engines, transfer_of(kind, backend, tmp_path / "weights"), dtype="float32")
    await sync(0)
    train(backend)
    between.path = route
    faults = {"reset": "reset", "killed": server.replace, "restarted": partial(restart, server)}
    between.faults.append(faults[fault])
    await sync(1)
    assert len(recovered) == 1
    (served,) = await engines[0].generate(PROMPT, {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True})
    assert served.weight_version == server.version() == "1"
    server.replace()
    assert await engines[0].generate(PROMPT, {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}) == [served]
    assert server.version() == "1" and len(recovered) == 2
    await sync.aclose()
    backend.close()


async def test_without_a_budget_it_is_an_error(server: Server, between: Proxy, tmp_path: Path) -> None:
    """Goal: with restarts_max=0 a sync that is cut off raises, as it did. Red with it swallowed."""
    backend = tiny_backend(tmp_path)
    engines = resilient([SGLangEngine(between.url)], reruns_max=0, recover_timeout_s=1.0)
    sync = WeightSync(backend, engines, transfer_of("tensor", backend, tmp_path), dtype="float32")
    between.path = "/update_weights_from_tensor"
    between.faults.append("reset")
    with pytest.raises(WeightSyncError, match="update_weights_from_tensor"):
        await sync(0)
    await sync.aclose()
    backend.close()
