"""Wait for an engine that is started again, and bring it back to the weights that it was given."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from rollouts.training.inference.http import EngineError, EngineLost
from rollouts.training.inference.inference_engine import InferenceEngine
from rollouts.training.inference.pool.given_weights import GivenWeights

logger = logging.getLogger(__name__)
RETRY_S = 0.2  # between two attempts
ANSWER_TIMEOUT_S = 1.0  # for an engine that was down to answer, while another one could serve


@dataclass(frozen=True)
class Recovered:
    """An engine that came back."""

    url: str
    reason: str  # what was wrong
    weight_version: str | None  # that it serves now; None: it was never given any
    seconds: float  # without it


@dataclass(frozen=True)
class Reruns:
    """What a pool does about engines that fail."""

    times_max: int  # a request is run again so often at most
    recover_timeout_s: float  # for an engine to come back
    on_recovered: Callable[[Recovered], None] | None


async def bring_back(
    client: InferenceEngine, given: GivenWeights, reruns: Reruns, *, reason: str, again: bool
) -> object:
    """Wait for the engine and give it the newest weights unless it serves them, with `again` even then.

    Return what giving them returned, once `reruns.on_recovered` was told. Raises EngineError after
    `reruns.recover_timeout_s`, with `reason`, which is what was wrong, and what was seen last.
    """
    started, last, timeout_s = time.monotonic(), reason, reruns.recover_timeout_s
    with anyio.move_on_after(timeout_s):
        while True:
            try:
                answer = await _restore(client, given, timeout_s, again=again)
                _tell(client, given.newest, reruns, reason, time.monotonic() - started)
                return answer
            except EngineError as error:
                if not is_lost(error):
                    raise
                last = str(error)
            await anyio.sleep(RETRY_S)
    raise EngineError(
        f"{client}: did not come back within {timeout_s:g} s. What was wrong: {reason}. Last seen: {last}"
    )


def _tell(
    client: InferenceEngine, version: str | None, reruns: Reruns, reason: str, seconds: float
) -> None:
    logger.warning(
        "%s: is back with weights %s after %.1f s (%s)", client, version, seconds, reason
    )
    if reruns.on_recovered:
        reruns.on_recovered(Recovered(client.base_url, reason, version, seconds))


async def _restore(
    client: InferenceEngine, given: GivenWeights, timeout_s: float, *, again: bool
) -> object:
    """Try once. Readiness comes last: an engine whose update was cut off is not ready, but paused."""
    answer = None
    served = await served_version(client)
    if given.give is not None and (again or served != given.newest):
        answer = await given.give(client)
    await client.wait_ready(timeout_s)
    if given.versions and await served_version(client) != given.newest:
        raise EngineLost(f"{client}: died again after it was given weights {given.newest}")
    return answer


async def served_version(client: InferenceEngine) -> str:
    return str((await client.model_info()).get("weight_version"))


async def lives_anew(client: InferenceEngine, given: GivenWeights) -> bool:
    """Return whether it serves weights that it was never given here. Its refusals are then of its new life."""
    try:
        return len(given.versions) > 1 and await served_version(client) not in given.versions
    except EngineError:
        return True


async def answers(client: InferenceEngine) -> bool:
    """Return whether the engine answers, quickly."""
    with anyio.move_on_after(ANSWER_TIMEOUT_S):
        try:
            await client.model_info()
        except EngineError:
            return False
        return True
    return False


def is_lost(error: BaseException | None) -> bool:
    """Return whether the engine failed. A weight sync's failure is the engine's if its cause is."""
    while error is not None and not isinstance(error, EngineLost):
        error = error.__cause__
    return error is not None
