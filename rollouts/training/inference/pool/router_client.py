"""Client of SGLang's router. It samples at the replica that the router chooses; all else goes to the replicas.

The router reads a request before it forwards it: it takes one set of sampling_params, no list of them (422), and drops
those that it does not know. So every row, with its own seed, is a request. Answers come as the replica gave them. Seen
with sglang-router 0.3.2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio

from rollouts.training import open_files
from rollouts.training.inference.http import EngineError, EngineLost, Generation, HTTPClient
from rollouts.training.inference.loop_lock import LoopLimiter
from rollouts.training.inference.sglang_client import (
    RequestEntry,
    SGLangEngine,
    entries_of,
    generations,
)

# raises EngineLost for an answer that does not count
Check = Callable[[Sequence[Generation]], None]


class RouterClient(HTTPClient):
    """Client of the router at `base_url`. `replica` is the client of one of the replicas, which are all alike.

    At most `requests_max` requests are under way at once; others wait here. Other options as HTTPClient's.
    """

    def __init__(
        self, base_url: str, replica: SGLangEngine, *, requests_max: int, **options: Any
    ) -> None:
        super().__init__(base_url, **options)
        self._replica = replica
        self._row_rids: dict[str, list[str]] = {}
        self._limit = LoopLimiter(lambda: min(requests_max, open_files.requests_max()))

    def rids_of(self, rid: str) -> list[str]:
        """Return the names of a request's rows at the replicas, while it is in flight."""
        return self._row_rids.get(rid, [rid])

    async def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Mapping[str, Any]],
        *,
        n: int,
        return_logprob: bool,
        rid: str | None,
        check: Check,
    ) -> list[list[Generation] | EngineLost]:
        """Return the n continuations of each prompt, or how the router or a replica behind it failed.

        Only a single prompt may have a `rid`. Raises EngineError for the caller's mistakes, after all have answered.
        """
        await self._replica.check(prompts, params, n)
        kind = (await self._replica.server()).kind
        asked = [
            entries_of(kind, prompt, item, n, rid)
            for prompt, item in zip(prompts, params, strict=True)
        ]
        answers: list[list[list[Generation] | EngineError]] = [
            [[] for _ in entries] for entries in asked
        ]

        async def ask(
            entry: RequestEntry, into: list[list[Generation] | EngineError], place: int
        ) -> None:
            try:
                into[place] = await self._ask(entry, return_logprob, check)
            except EngineError as error:
                into[place] = error

        if rid is not None:
            self._row_rids[rid] = [str(entry.rid) for entry in asked[0]]
        try:
            async with anyio.create_task_group() as tasks:
                for entries, into in zip(asked, answers, strict=True):
                    for place, entry in enumerate(entries):
                        tasks.start_soon(ask, entry, into, place)
        finally:
            if rid is not None:
                self._row_rids.pop(rid, None)
        return [_of_prompt(parts) for parts in answers]

    async def _ask(
        self, entry: RequestEntry, return_logprob: bool, check: Check
    ) -> list[Generation]:
        body: dict[str, Any] = {
            "input_ids": entry.input_ids,
            "sampling_params": entry.sampling_params,
        }
        body["return_logprob"] = return_logprob
        if entry.rid is not None:
            body["rid"] = entry.rid
        async with self._limit.here():
            answer = await self.request("POST", "/generate", body)
        # a single continuation comes without its list
        rows = answer if isinstance(answer, list) else [answer]
        found = generations(rows, entry.rows, return_logprob, self.base_url)
        check(found)
        return found


def _of_prompt(parts: Sequence[list[Generation] | EngineError]) -> list[Generation] | EngineLost:
    """Return the prompt's rows in order, or the first loss among them. Raises any other error."""
    rows: list[Generation] = []
    lost: EngineLost | None = None
    for part in parts:
        if isinstance(part, EngineLost):
            lost = lost or part
        elif isinstance(part, EngineError):
            raise part
        else:
            rows += part
    return lost or rows
