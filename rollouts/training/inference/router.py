"""Client of SGLang's router: sampling at whichever replica it chooses; all else is asked of the replicas themselves.

The router reads a request before it hands it on: it takes one set of sampling_params, no list of them (422), and drops
those that it does not know. So every row, with its own seed, is a request. Answers come as the replica gave them. Seen
with sglang-router 0.3.2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio

from rollouts.training import open_files
from rollouts.training.inference.http import EngineError, EngineLost, Generation, HTTPEngine
from rollouts.training.inference.loop_lock import LoopLimiter
from rollouts.training.inference.sglang import Entry, SGLangEngine, entries_of, generations

Check = Callable[[Sequence[Generation]], None]  # raises EngineLost for an answer that must not be taken


class Router(HTTPEngine):
    """The router at `base_url`. `replica`: the client of one of those behind it, which are all alike. At most
    `requests_max` requests are under way at once; more wait in line here. Other options as HTTPEngine's.
    """

    def __init__(self, base_url: str, replica: SGLangEngine, *, requests_max: int, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._replica = replica
        self._row_rids: dict[str, list[str]] = {}
        self._line = LoopLimiter(lambda: min(requests_max, open_files.requests_max()))

    def rids_of(self, rid: str) -> list[str]:
        """What the replicas know the rows of a request in flight by."""
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
        """Of each prompt its n continuations, or how the router, or a replica behind it, failed; `rid` is a single
        prompt's. Raises EngineError for the caller's mistakes, once all that was asked is answered.
        """
        await self._replica.check(prompts, params, n)
        kind = (await self._replica.server()).kind
        asked = [entries_of(kind, prompt, item, n, rid) for prompt, item in zip(prompts, params, strict=True)]
        answers: list[list[list[Generation] | EngineError]] = [[[] for _ in entries] for entries in asked]

        async def ask(entry: Entry, into: list[list[Generation] | EngineError], place: int) -> None:
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

    async def _ask(self, entry: Entry, return_logprob: bool, check: Check) -> list[Generation]:
        body: dict[str, Any] = {"input_ids": entry.input_ids, "sampling_params": entry.sampling_params}
        body["return_logprob"] = return_logprob
        if entry.rid is not None:
            body["rid"] = entry.rid
        async with self._line.here():
            answer = await self._request("POST", "/generate", body)
        rows = answer if isinstance(answer, list) else [answer]  # a single continuation comes without its list
        found = generations(rows, entry.rows, return_logprob, self.base_url)
        check(found)
        return found


def _of_prompt(parts: Sequence[list[Generation] | EngineError]) -> list[Generation] | EngineLost:
    """The prompt's rows in order, or the first loss among them. Raises any other error."""
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
