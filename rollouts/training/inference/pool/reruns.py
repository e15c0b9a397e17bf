"""Decide who is asked, and what happens between a request that failed and its next attempt."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from rollouts.training.inference.http import EngineLost, Generation
from rollouts.training.inference.pool.judge import Judge
from rollouts.training.inference.pool.recovery import ANSWER_TIMEOUT_S, answers, served_version
from rollouts.training.inference.pool.replica import Replica
from rollouts.training.inference.pool.router_client import RouterClient

logger = logging.getLogger(__name__)


async def choose(replicas: Sequence[Replica], home: Replica) -> Replica:
    """Return `home` if it is up or has just come back; else another that is up; else `home`."""
    others_up = [replica for replica in replicas if replica is not home and replica.is_up]
    if not home.is_up and others_up:
        recoveries = home.recoveries
        if not await answers(home.client):
            return others_up[0]
        await home.recover(recoveries, "it was down")
    return home


async def after_loss(
    replicas: Sequence[Replica], lost: Replica, recoveries: int, reason: str
) -> None:
    """Return once a replica can answer. `recoveries` are those of `lost` before it was asked."""
    lost.note_lost(recoveries)
    if not any(replica.is_up for replica in replicas):
        await lost.recover(recoveries, reason)


async def ask_router(
    router: RouterClient,
    replicas: Sequence[Replica],
    prompts: Sequence[Sequence[int]],
    params: Sequence[Mapping[str, Any]],
    *,
    may_rerun: bool,
    **options: Any,
) -> dict[int, list[Generation]]:
    """Return by index the groups that came through the router. Those that it failed are missing.

    Unless `may_rerun`, it raises the first EngineLost.
    """
    found = await router.sample(prompts, params, check=Judge(replicas).check, **options)
    lost = [answer for answer in found if isinstance(answer, EngineLost)]
    if lost and not may_rerun:
        raise lost[0]
    if lost:
        logger.warning(
            "%s; %d of %d prompts are run again, past the router", lost[0], len(lost), len(found)
        )
        for replica in replicas:
            await _look(replica, str(lost[0]))
    return {
        index: answer for index, answer in enumerate(found) if not isinstance(answer, EngineLost)
    }


async def _look(replica: Replica, reason: str) -> None:
    """Give this engine its weights if it was started again. Count it as down if it does not answer."""
    recoveries = replica.recoveries
    try:
        with anyio.fail_after(ANSWER_TIMEOUT_S):
            served = await served_version(replica.client)
    except (EngineLost, TimeoutError):
        replica.note_lost(recoveries)
        return
    if not replica.given.explain(served):
        await replica.recover(recoveries, reason)
