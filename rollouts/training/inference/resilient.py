"""Engines that come back: what a death or a hang interrupts is done again, under the weights it was meant for.

    engines = resilient([SGLangEngine(url) for url in urls], reruns_max=3, recover_timeout_s=180)

Somebody else, the supervisor, starts a dead engine again; it then serves its start model. Here it is waited for, given
the current weights, proven to serve them, and asked again, with the same seed. So an engine whose answers follow from
weights, request and seed (the embedded one, on a CPU) gives a run the same results with its deaths as without. Under
asyncio and trio.

With a router in front of the engines, requests go through it, each once. What comes of it is judged in the same way;
what fails is run again at the engines themselves, as if there were no router, after they have been looked at: so a
router that is down costs nothing but its choice.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio

from rollouts.training.inference.http import EngineError, EngineLost, Generation
from rollouts.training.inference.loop_lock import LoopLock
from rollouts.training.inference.requests import per_prompt
from rollouts.training.inference.router import Router

RETRY_S = 0.2  # between two looks at an engine that is down
REJOIN_TIMEOUT_S = 1.0  # for an engine that was down to answer, while another one could serve

Give = Callable[[Any], Awaitable[Any]]  # gives a client's engine weights, and proves that they serve
OnRecovered = Callable[["Recovered"], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """An engine that came back."""

    url: str
    reason: str  # what was wrong
    weight_version: str | None  # that it serves now; None: it was never given any
    seconds: float  # without it


def resilient(
    clients: Sequence[Any],
    *,
    reruns_max: int,
    recover_timeout_s: float,
    on_recovered: OnRecovered | None = None,
    router: Router | None = None,
) -> list["ResilientEngine"]:
    """The clients, each wrapped, standing in for each other, behind `router` if there is one. See ResilientEngine."""
    options: dict[str, Any] = {"recover_timeout_s": recover_timeout_s, "on_recovered": on_recovered}
    engines = [ResilientEngine(client, reruns_max=reruns_max, **options) for client in clients]
    for engine in engines:
        engine.peers = [peer for peer in engines if peer is not engine]
        engine.router = router
    return engines


class ResilientEngine:
    """A client whose requests outlive its engine; everything that is not named here is the client's own.

    `generate` and `generate_batch` are run again after EngineLost (a broken connection, 5xx, no answer in time), after
    an abort that nobody here asked for, and after an answer that other weights sampled than those this engine was
    given: at most `reruns_max` times a request, first by a peer that is up, else once this engine is back, which is
    waited for `recover_timeout_s` at most. Behind a router, that is asked first, once. Errors that are the caller's
    (4xx) are raised as they come. With `reruns_max` 0 nothing is run again.
    """

    def __init__(
        self, client: Any, *, reruns_max: int, recover_timeout_s: float, on_recovered: OnRecovered | None = None
    ) -> None:
        self.client = client
        self.reruns_max = reruns_max
        self.recover_timeout_s = recover_timeout_s
        self.peers: Sequence[ResilientEngine] = ()
        self.router: Router | None = None
        self._on_recovered = on_recovered
        self._on_lost: Callable[[], object] | None = None
        self._is_up = True
        self._recoveries = 0
        self._give: Give | None = None  # of the newest of the versions
        self._versions: list[str] = []  # all that it was given, or is being given; none: it serves what it started with
        self._settled = 0  # index of the newest one that is proven
        self._aborts = 0  # that the caller asked for
        self._lock = LoopLock()

    def __getattr__(self, name: str) -> Any:
        if name == "client":  # not set yet: a copy, or an unpickled one
            raise AttributeError(name)
        return getattr(self.client, name)

    def __repr__(self) -> str:
        return repr(self.client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.aclose()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def generate(self, *arguments: Any, **options: Any) -> list[Generation]:
        """As the client's."""
        if self.router is not None:
            return await self._generate_through(self.router, *arguments, **options)
        return await self._rerun(lambda client: client.generate(*arguments, **options), self.reruns_max)

    async def generate_batch(self, *arguments: Any, **options: Any) -> list[list[Generation]]:
        """As the client's."""
        if self.router is not None:
            return await self._batch_through(self.router, *arguments, **options)
        return await self._rerun(lambda client: client.generate_batch(*arguments, **options), self.reruns_max)

    async def abort(self, rid: str | None = None) -> None:
        """As the client's; what it ends stays ended. Behind a router, `rid` is looked for at every replica."""
        if rid is None or self.router is None:
            self._aborts += 1
            await self.client.abort(rid)
            return
        for engine in (self, *self.peers):
            engine._aborts += 1
            with contextlib.suppress(EngineLost):  # what it had is gone with it
                for one in self.router.rids_of(rid):
                    await engine.client.abort(one)

    async def pause(self, mode: str = "retract") -> None:
        """As the client's; what "abort" ends stays ended."""
        self._aborts += mode == "abort"
        await self.client.pause(mode)

    @property
    def input_logprobs(self) -> Callable[..., Awaitable[list[float]]]:
        """As the client's, if it has it; always this engine's own, and under the weights that it was given."""
        probe = self.client.input_logprobs

        async def input_logprobs(*arguments: Any, **options: Any) -> list[float]:
            async def ask(client: Any) -> list[float]:
                found: list[float] = await probe(*arguments, **options)
                served = await self._served_version()
                if self._versions and served not in self._versions[self._settled :]:
                    raise EngineLost(f"{self}: serves weights {served}; was given {self._versions[-1]}")
                return found

            return list(await self._rerun(ask, self.reruns_max, here=True))

        return input_logprobs

    async def _rerun(self, ask: Callable[[Any], Awaitable[Any]], reruns_max: int, *, here: bool = False) -> Any:
        """`here`: no peer can answer it."""
        for left in range(reruns_max, -1, -1):
            engine = self if here else await self._who_serves()
            recoveries = engine._recoveries
            try:
                return await engine._ask(ask)
            except EngineLost as error:
                if not left:
                    raise
                logger.warning("%s; the request is run again, at most %d more times", error, left)
                engine._is_lost_since(recoveries)
                if here or not any(one._is_up for one in (self, *self.peers)):
                    await engine._recover(recoveries, str(error))
        raise AssertionError("the last round returns or raises")

    async def _who_serves(self) -> "ResilientEngine":
        """This engine, if it is up or has just come back; else a peer that is; else this one."""
        peers_up = [peer for peer in self.peers if peer._is_up]
        if not self._is_up and peers_up:
            recoveries = self._recoveries
            if not await self._answers():
                return peers_up[0]
            await self._recover(recoveries, "it was down")
        return self

    async def _ask(self, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        asked = _Asked([self])
        answer = await ask(self.client)
        asked.judge(answer)
        return answer

    # --- through a router ---------------------------------------------------------------------------------------------

    async def _generate_through(
        self,
        router: Router,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[Generation]:
        async def again(client: Any, _: Sequence[int]) -> list[list[Generation]]:
            return [await client.generate(input_ids, sampling_params, n=n, return_logprob=return_logprob, rid=rid)]

        options: dict[str, Any] = {"n": n, "return_logprob": return_logprob, "rid": rid}
        (group,) = await self._through(router, again, [input_ids], [sampling_params], **options)
        return group

    async def _batch_through(
        self,
        router: Router,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
    ) -> list[list[Generation]]:
        params, options = per_prompt(sampling_params, len(prompts)), {"n": n, "return_logprob": return_logprob}

        async def again(client: Any, lost: Sequence[int]) -> list[list[Generation]]:
            own = [prompts[index] for index in lost], [params[index] for index in lost]
            groups: list[list[Generation]] = await client.generate_batch(*own, **options)
            return groups

        return await self._through(router, again, prompts, params, rid=None, **options)

    async def _through(
        self,
        router: Router,
        again: Callable[[Any, Sequence[int]], Awaitable[list[list[Generation]]]],
        *request: Any,
        **options: Any,
    ) -> list[list[Generation]]:
        """What the router gives; `again(client, lost)` asks an engine for those prompts, by index, that it fails."""
        asked = _Asked([self, *self.peers])
        answers = await router.sample(*request, check=asked.judge, **options)
        lost = {index: answer for index, answer in enumerate(answers) if isinstance(answer, EngineLost)}
        if not lost:
            return [answer for answer in answers if not isinstance(answer, EngineLost)]
        error = next(iter(lost.values()))
        if not self.reruns_max:
            raise error
        logger.warning("%s; %d of %d prompts are run again, past the router", error, len(lost), len(answers))
        for engine in (self, *self.peers):
            await engine._look(str(error))
        groups = await self._rerun(lambda client: again(client, list(lost)), self.reruns_max - 1)
        mended = dict(zip(lost, groups, strict=True))
        return [mended[index] if isinstance(answer, EngineLost) else answer for index, answer in enumerate(answers)]

    async def _look(self, reason: str) -> None:
        """After a request failed somewhere: if this engine began anew it gets its weights; if it does not answer, the
        others are asked until it does."""
        recoveries = self._recoveries
        try:
            with anyio.fail_after(REJOIN_TIMEOUT_S):
                served = await self._served_version()
        except (EngineLost, TimeoutError):
            self._is_lost_since(recoveries)
            return
        if self._versions and served not in self._versions[self._settled :]:
            await self._recover(recoveries, reason)

    # --- weights ------------------------------------------------------------------------------------------------------

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """As the client's; done again when the engine dies over it, and whenever it comes back. The directory has to
        stay until the next update."""
        version = weight_version or f"{Path(checkpoint_path).name}-{uuid.uuid4().hex[:8]}"
        answer: dict[str, Any] = await self.give_weights(
            version, lambda client: client.update_weights_from_checkpoint(checkpoint_path, weight_version=version)
        )
        return answer

    async def give_weights(self, version: str, give: Give) -> Any:
        """Have `give(client)` bring the engine to `version` and prove it; what it returns.

        It is called again when the engine is lost over it, and each time it comes back until other weights are given.
        Raises what `give` raises (the engine then counts as having the version before), and EngineError when the engine
        does not come back.
        """
        async with self.receiving(version, give):
            try:
                return await give(self.client)
            except EngineError as error:
                return await self.receive_again(error)

    @contextlib.asynccontextmanager
    async def receiving(self, version: str, give: Give) -> AsyncIterator[None]:
        """Within, the caller brings the client's engine to `version`, by itself or with others; `give(client)` does it
        alone. Requests may be answered by either version meanwhile, and none is run again before the end."""
        async with self._lock.here():
            before = self._give
            self._give = give
            self._versions.append(version)
            try:
                yield
            except BaseException:
                self._give = before
                self._versions.pop()
                raise
            self._settled = len(self._versions) - 1
            self._is_up = True

    async def receive_again(self, error: EngineError) -> Any:
        """Within `receiving`: wait for an engine that was lost, and give it the weights. Raises any other `error`."""
        if not self.reruns_max or not (_is_lost(error) or await self._began_anew()):
            raise error
        self._is_lost_since(self._recoveries)
        logger.warning("%s; the weights are sent again", error)
        return await self._bring_back(str(error), again=True)

    def comes_back_with(self, give: Give) -> None:
        """From now on `give(client)` is what brings it to the version that it was given last."""
        self._give = give

    # --- recovery -----------------------------------------------------------------------------------------------------

    def when_lost(self, act: Callable[[], object]) -> None:
        """From now on call `act` each time the engine is found lost, before it is waited for: it starts meanwhile."""
        self._on_lost = act

    def _is_lost_since(self, recoveries: int) -> None:
        """What failed was asked after so many recoveries: the engine is down, unless it has come back meanwhile."""
        if self._is_up and self._recoveries == recoveries:
            self._is_up = False
            if self._on_lost is not None:
                self._on_lost()

    async def _recover(self, recoveries: int, reason: str) -> None:
        """Bring the engine back, once for all requests that saw it fail."""
        async with self._lock.here():
            if self._recoveries == recoveries:
                await self._bring_back(reason, again=False)

    async def _bring_back(self, reason: str, *, again: bool) -> Any:
        """Wait for the engine and give it the current weights unless it serves them, with `again` even then; returns
        what giving them returned. Raises EngineError when that takes longer than `recover_timeout_s`."""
        started, last = time.monotonic(), reason
        with anyio.move_on_after(self.recover_timeout_s):
            while True:
                try:
                    answer = await self._restore(again=again)
                    seconds = time.monotonic() - started
                    self._recoveries += 1
                    self._is_up = True
                    version = self._versions[-1] if self._versions else None
                    logger.warning("%s: is back with weights %s after %.1f s (%s)", self, version, seconds, reason)
                    if self._on_recovered:
                        self._on_recovered(Recovered(self.client.base_url, reason, version, seconds))
                    return answer
                except EngineError as error:
                    if not _is_lost(error):
                        raise
                    last = str(error)
                await anyio.sleep(RETRY_S)
        within = f"within {self.recover_timeout_s:g} s"
        raise EngineError(f"{self}: did not come back {within}. What was wrong: {reason}. Last seen: {last}")

    async def _restore(self, *, again: bool) -> Any:
        """One attempt. The readiness is looked at last: an engine whose update was cut off is not ready, but paused."""
        answer = None
        served = await self._served_version()
        if self._give is not None and (again or served != self._versions[-1]):
            answer = await self._give(self.client)
        await self.client.wait_ready(self.recover_timeout_s)
        if self._versions and await self._served_version() != self._versions[-1]:
            raise EngineLost(f"{self}: died again after it was given weights {self._versions[-1]}")
        return answer

    async def _served_version(self) -> str:
        return str((await self.client.model_info()).get("weight_version"))

    async def _began_anew(self) -> bool:
        """Does it serve weights that nobody here gave it? Its refusals are then those of another life."""
        try:
            return len(self._versions) > 1 and await self._served_version() not in self._versions
        except EngineError:
            return True

    async def _answers(self) -> bool:
        """Does it answer, quickly?"""
        with anyio.move_on_after(REJOIN_TIMEOUT_S):
            try:
                await self.client.model_info()
            except EngineError:
                return False
            return True
        return False


class _Asked:
    """A request that one of `engines` answers: what they had been given when it was asked."""

    def __init__(self, engines: Sequence[ResilientEngine]) -> None:
        self._engines = engines
        self._settled = [engine._settled for engine in engines]
        self._aborts = self._aborts_now()

    def judge(self, answer: Sequence[Any]) -> None:
        """Raise EngineLost for an answer by other weights than were given before it was asked, or meanwhile, and for
        an abort that the caller did not ask for."""
        who = " or ".join(map(str, self._engines))
        allowed = [version for engine, first in self._pairs() for version in engine._versions[first:]]
        for generation in _flat(answer):
            sampled_with = {generation.weight_version, *(span["version"] for span in generation.weight_versions)}
            foreign = sampled_with - {*allowed, ""}  # "": not one token was sampled
            if allowed and foreign:
                found = ", ".join(sorted(foreign))
                raise EngineLost(f"{who}: sampled with weights {found}; was given {allowed[-1]}: it started anew")
            if generation.finish_reason == "abort" and self._aborts == self._aborts_now():
                raise EngineLost(f"{who}: gave up a request: {generation.finish_detail.get('message')}")

    def _pairs(self) -> Iterator[tuple[ResilientEngine, int]]:
        return zip(self._engines, self._settled, strict=True)

    def _aborts_now(self) -> int:
        return sum(engine._aborts for engine in self._engines)


def _is_lost(error: BaseException | None) -> bool:
    """Is it the engine's failure? A weight sync's is what caused it."""
    while error is not None and not isinstance(error, EngineLost):
        error = error.__cause__
    return error is not None


def _flat(answer: Sequence[Any]) -> Iterator[Generation]:
    """The generations of an answer, a list or a list of lists; none in a list of numbers."""
    for item in answer:
        if isinstance(item, Generation):
            yield item
        elif isinstance(item, list):
            yield from item
