"""Wait for an engine that is started again, and bring it back to the weights that it was given."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from rollouts.training.inference.http import EngineError, EngineLost
from rollouts.training.inference.inference_engine import InferenceEngine
from rollouts.training.inference.pool.given_weights import GivenWeights

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
    client: InferenceEngine, given: GivenWeights, timeout_s: float, *, reason: str, again: bool
) -> tuple[object, float]:
    """Wait for the engine and give it the newest weights unless it serves them, with `again` even then.

    Return what giving them returned, and the seconds that it took. Raises EngineError after `timeout_s`, with `reason`,
    which is what was wrong, and what was seen last.
    """
    started, last = time.monotonic(), reason
    with anyio.move_on_after(timeout_s):
        while True:
            try:
                return await _restore(client, given, timeout_s, again=again), time.monotonic() - started
            except EngineError as error:
                if not is_lost(error):
                    raise
                last = str(error)
            await anyio.sleep(RETRY_S)
    raise EngineError(
        f"{client}: did not come back within {timeout_s:g} s. What was wrong: {reason}. Last seen: {last}"
    )


async def _restore(client: InferenceEngine, given: GivenWeights, timeout_s: float, *, again: bool) -> object:
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
