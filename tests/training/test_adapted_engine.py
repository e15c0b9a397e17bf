"""Engines of a user's own in a pool: they have some calls of the protocol, and are adapted once."""

from typing import Any

import pytest

from rollouts.training.inference.adapted_engine import as_client
from rollouts.training.inference.http import EngineError, Generation
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.weight_sync import SGLangEngine, sync_weights_to_engines

pytestmark = pytest.mark.anyio


class OnlyUpdates:
    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        return {"success": True, "path": checkpoint_path}


class OnlySamples:
    """Its answers are aborted, by a version that the pool never gave: a pool of ours would not count them."""

    base_url = "mine"

    async def generate_batch(
        self, prompts: Any, sampling_params: Any, *, n: int, return_logprob: bool
    ) -> list[Any]:
        row = Generation([1], [0.0], "abort", {}, "another", [], None, 1, 0)
        return [[row] * n for _ in prompts]


async def test_an_engine_needs_only_the_calls_that_are_made() -> None:
    """Goal: what an engine lacks matters when it is asked for, and is then named. An abort has nothing to end, and an
    engine that cannot score has no proof. Red with a check of all calls in `of`."""
    pool = EnginePool.of([OnlyUpdates(), OnlySamples()])
    await pool.abort()
    assert await pool.replicas[0].input_logprobs([1, 2]) is None
    with pytest.raises(
        EngineError, match=r"OnlyUpdates object .*: this engine lacks generate_batch\(\)"
    ):
        await pool.generate([1], {})
    with pytest.raises(EngineError, match="mine: this engine lacks update_weights_from_checkpoint"):
        await sync_weights_to_engines([OnlyUpdates(), OnlySamples()], "/a")
    assert await sync_weights_to_engines([OnlyUpdates()], "/a", "1") == [
        {"success": True, "path": "/a"}
    ]


async def test_its_answers_are_taken_as_they_come() -> None:
    """Goal: a pool made of a list neither judges nor runs again, as a list never was. Red with reruns_max=0 in `of`."""
    pool = EnginePool.of([OnlySamples()])
    (row,) = await pool.generate([1], {})
    assert (row.finish_reason, row.weight_version) == ("abort", "another")


def test_what_is_ours_is_not_adapted() -> None:
    """Goal: a pool stays itself, with its reruns, and so does a client. Red with everything wrapped."""
    client = SGLangEngine("http://127.0.0.1:1")
    pool = EnginePool([client], reruns_max=3, recover_timeout_s=1.0)
    assert EnginePool.of(pool) is pool
    assert as_client(client) is client and EnginePool.of([client]).clients == [client]
