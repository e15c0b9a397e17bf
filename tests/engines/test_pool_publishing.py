"""A trainer's weight sync, of each kind that the embedded engine takes, while its engine dies or is cut off."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.recovery import Recovered
from rollouts.training.weight_sync import SGLangEngine, WeightSyncError
from rollouts.training.weights.channel.shared_memory import SharedMemoryChannel
from rollouts.training.weights.deliver.buckets import BucketDelivery
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.publish import WeightPublisher
from tests.engines import sharded_ranks
from tests.engines.lives import WAIT_S, Server
from tests.engines.proxy import Proxy, proxy
from tests.engines.serving import REPOSITORY
from tests.training.tiny import tiny_backend, tiny_model, tiny_tokenizer
from tests.weights.deliveries import expected_logprobs

pytestmark = pytest.mark.anyio
PROMPT = [2, 3, 4]
ROUTES = {
    # the last: what proves it
    "disk": ("/pause_generation", "/update_weights_from_disk", "/generate"),
    "tensor": (
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/flush_cache",
        "/generate",
    ),
}
CASES = [
    (kind, *case)
    for kind in ROUTES
    for case in itertools.product(ROUTES[kind], ["reset", "killed"])
]
CASES += [
    ("disk", "/flush_cache", "restarted"),
    ("tensor", "/update_weights_from_tensor", "restarted"),
]

# of this machine and moment, not of the run
MEASURED = re.compile(r".*_s|age_s_.*|peak_memory_gib|groups_carried_.*")


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


def delivery_of(kind: str, backend: Any, directory: Path, *, keep: bool = False) -> Any:
    if kind == "disk":
        return DiskDelivery(backend, directory)
    return BucketDelivery(
        backend,
        SharedMemoryChannel(tensor_parallel_size=1),
        dtype=None,
        bucket_bytes=4096,
        keep=keep,
    )


def restart(server: Server) -> None:
    """Dead and back before the call gets through: the new life refuses it, or denies the weights."""
    server.replace()
    server.await_health()


def train(backend: Any) -> None:
    """What stands for a step: other weights."""
    with torch.no_grad():
        for parameter in backend.model.parameters():
            parameter.mul_(1.25)
    backend._trained.step += 1


@pytest.mark.parametrize(("kind", "route", "fault"), CASES)
async def test_a_sync_is_done_again(
    server: Server, between: Proxy, tmp_path: Path, *, kind: str, route: str, fault: str
) -> None:
    """Goal: whichever call of a sync, or of its proof, breaks or finds its engine dead, the engine serves the trainer's
    weights of now in the end, proven; and gets them again when it dies later. Red without receive_again, with the
    start's weights for what comes back, with a session left open whose opening was not answered, and with a step noted
    as the sync's only at its end: its weights then counted as gone."""
    backend, recovered = tiny_backend(tmp_path), list[Recovered]()
    options: dict[str, Any] = {
        "reruns_max": 3,
        "recover_timeout_s": WAIT_S,
        "on_recovered": recovered.append,
    }
    pool = EnginePool([SGLangEngine(between.url)], **options)
    publisher = WeightPublisher(
        backend, pool, delivery_of(kind, backend, tmp_path / "weights"), dtype="float32"
    )
    await publisher.publish(0)
    train(backend)
    between.path = route
    faults = {"reset": "reset", "killed": server.replace, "restarted": partial(restart, server)}
    between.faults.append(faults[fault])
    await publisher.publish(1)
    assert len(recovered) == 1
    (served,) = await pool.generate(
        PROMPT, {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    )
    assert served.weight_version == server.version() == "1"
    server.replace()
    assert await pool.generate(
        PROMPT, {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    ) == [served]
    assert server.version() == "1" and len(recovered) == 2
    await publisher.aclose()
    backend.close()


@pytest.mark.parametrize("keep", [True, False])
async def test_a_death_after_a_step(
    server: Server, between: Proxy, tmp_path: Path, *, keep: bool
) -> None:
    """Goal: an engine that comes back when the trainer has other weights already gets those of its version, where they
    are kept; else the error says how to. Red with the model's own sent."""
    backend = tiny_backend(tmp_path)
    pool = EnginePool([SGLangEngine(between.url)], reruns_max=3, recover_timeout_s=WAIT_S)
    publisher = WeightPublisher(
        backend, pool, delivery_of("tensor", backend, tmp_path, keep=keep), dtype="float32"
    )
    await publisher.publish(0)
    expected = expected_logprobs(backend.model, PROMPT)
    train(backend)
    server.replace()
    if keep:
        await pool.generate(PROMPT, {"max_new_tokens": 1})
        assert await pool.replicas[0].input_logprobs(PROMPT) == pytest.approx(expected, abs=1e-5)
    else:
        with pytest.raises(
            WeightSyncError,
            match=r"taken steps since this version, .*give BucketDelivery keep=True",
        ):
            await pool.generate(PROMPT, {"max_new_tokens": 1})
    await publisher.aclose()
    backend.close()


async def test_without_a_budget_it_is_an_error(
    server: Server, between: Proxy, tmp_path: Path
) -> None:
    """Goal: with restarts_max=0 a sync that is cut off raises, as it did. Red with it swallowed."""
    backend = tiny_backend(tmp_path)
    pool = EnginePool([SGLangEngine(between.url)], reruns_max=0, recover_timeout_s=1.0)
    publisher = WeightPublisher(
        backend, pool, delivery_of("tensor", backend, tmp_path), dtype="float32"
    )
    between.path = "/update_weights_from_tensor"
    between.faults.append("reset")
    with pytest.raises(WeightSyncError, match="update_weights_from_tensor"):
        await publisher.publish(0)
    await publisher.aclose()
    backend.close()


# Each the nth request to a path, counted from the kill before
KILLS = [
    # Taking turns: over step 1's samples, while the other rank waits for them; over bringing it back; at the end of a
    # sync, at the beginning of the next, before a bucket was gathered, and between two buckets of the one after that
    ("/generate", 2),
    ("/update_weights_from_tensor", 2),
    ("/flush_cache", 2),
    ("/pause_generation", 2),
    ("/update_weights_from_tensor", 6),
    # One step ahead: over step 3's samples, which are asked for while step 2 trains; between two buckets of a sync
    ("/generate", 11),
    ("/update_weights_from_tensor", 5),
]


def kill_at(server: Server, between: Proxy, kills: Sequence[tuple[str, int]]) -> None:
    """Kill the engine, and start it again, at each of `kills` in turn."""
    between.path, number = kills[0] if kills else ("nothing", 1)

    def strike() -> None:
        server.replace()
        kill_at(server, between, kills[1:])

    between.faults.extend([*[lambda: None] * (number - 1), strike])


@pytest.mark.timeout(900)  # five runs; half a minute where nothing else runs
def test_a_sharded_model(server: Server, between: Proxy, tmp_path: Path) -> None:
    """Goal: shards are gathered on all ranks alike, and the engine serves the whole model. An RL run on two ranks whose
    engine dies again and again, while they wait, train or gather, has the numbers of one that is left alone.

    Red with nothing kept ("the others are waiting for this step's rollouts"), and with rank 0 leaving the gather at an
    engine's death: the ranks' collectives then no longer match.
    """
    kill_at(server, between, KILLS)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    arguments = [str(server.model), server.url, between.url, str(tmp_path)]
    command = [*torchrun, "-m", "tests.engines.sharded_ranks", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    expected = pytest.approx(expected_logprobs(tiny_model(seed=1), sharded_ranks.IDS), abs=1e-5)
    assert first["served"] == {"BucketDelivery": ["1", expected], "DiskDelivery": ["2", expected]}
    assert between.path == "nothing", "not all kills took place"
    # one of the kills hit a recovery
    assert (first["killed, lag 0"][1], first["killed, lag 1"][1]) == (4, 2)
    for lag in sharded_ranks.LAGS:
        alone = without_times(first[f"left alone, lag {lag}"][0])
        assert [row["lag_max"] for row in alone] == [0, *[lag] * 3]
        assert without_times(first[f"killed, lag {lag}"][0]) == alone
        assert without_times(second[f"killed, lag {lag}"][0]) == alone


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Of the metrics what does not depend on this machine and moment."""
    return [
        {key: value for key, value in row.items() if not MEASURED.fullmatch(key)} for row in rows
    ]
