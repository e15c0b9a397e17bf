"""Broadcast weights in a process group of the trainer's rank 0 and every process of the engines: gloo, or NCCL on GPUs.

Both sides build the group the same way, over a store under the group's name (`init_custom_process_group` in sglang's
srt/utils/common.py). A plain `init_process_group` on one of them would wait for ever. A collective that an engine
does not join is given up after `timeout_s`, and the group with it.

NCCL makes its communicator inside the first collective, and blocks the caller until all members have come. So no
collective is called on the event loop: each has a thread, with the group's device current, and starts after the
engines' requests. The group is bound to no device: that would make the communicator in `open`, where no engine joins.
"""

import contextlib
import datetime
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from rollouts.training.devices import poll, run_on
from rollouts.training.inference.fan_out import on_all_engines
from rollouts.training.inference.http import EngineError, EngineLost, WeightSyncError
from rollouts.training.inference.inference_engine import InferenceEngine, routes_of
from rollouts.training.stores import BoundStore
from rollouts.training.weights.wire import Buffer, WireTensor

_OTHERS_S = 1.0  # after one engine failed, for the others to say why they did
_LEAVE_S = 10.0  # for leaving a group; NCCL may wait for members that are gone


@dataclass(frozen=True)
class _Group:
    name: str
    group: dist.ProcessGroup
    store: dist.Store  # by which the others find us
    members: tuple[int, ...]  # the clients of its engines, by identity


class ProcessGroupChannel:
    """`Channel` over a process group, made at the first delivery, and again after a failure or for other engines."""

    def __init__(
        self, *, device_type: str, tensor_parallel_size: int = 1, timeout_s: float = 600.0
    ) -> None:
        self._backend = "nccl" if device_type == "cuda" else "gloo"
        self._per_engine = tensor_parallel_size
        self._timeout_s = timeout_s
        self._joined: _Group | None = None

    def in_flight(self, device: torch.device) -> int:
        """Return 1: all members take part in collectives in the same order."""
        return 1

    def buffer(self, nbytes: int, device: torch.device) -> Buffer:
        return Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device), None)

    async def open(self, clients: Sequence[InferenceEngine]) -> None:
        members = tuple(id(client) for client in clients)
        if self._joined is not None and self._joined.members == members:
            return
        await self.aclose(clients)
        name = f"rollouts-{uuid.uuid4().hex[:12]}"
        timeout = datetime.timedelta(seconds=self._timeout_s)
        world = 1 + len(clients) * self._per_engine
        address = _address_towards(clients[0].base_url)
        store = BoundStore(address, 0, world, True, timeout=timeout, wait_for_workers=False)
        made: list[dist.ProcessGroup] = []

        async def make() -> None:
            join = partial(_join, self._backend, store, world, name, timeout)
            made.append(await run_on(None, join))

        async def ask(client: InferenceEngine) -> None:
            offset = (
                1
                + next(at for at, other in enumerate(clients) if other is client) * self._per_engine
            )
            await routes_of(client).init_weights_update_group(
                address,
                store.port,
                rank_offset=offset,
                world_size=world,
                group_name=name,
                backend=self._backend,
            )

        await self._together("making the process group", clients, ask, make)
        self._joined = _Group(name, made[0], store, members)

    async def put(
        self,
        clients: Sequence[InferenceEngine],
        buffer: Buffer,
        entries: Sequence[WireTensor],
        version: str | None,
    ) -> None:
        assert self._joined is not None, "open() comes first"
        group, name = self._joined.group, self._joined.name
        flat = buffer.flat[: sum(entry.nbytes for entry in entries)]

        async def broadcast() -> None:
            start = partial(dist.broadcast, flat, 0, group=group, async_op=True)
            try:
                work = await run_on(flat.device, start)
                assert work is not None, "rank 0 is a member"
                await poll(work.is_completed)  # a thread in wait() could not be cancelled
                await run_on(flat.device, work.wait)
            except RuntimeError as error:  # often the first to see an engine's death
                raise EngineLost(f"the broadcast of {entries[0].name} failed: {error}") from None

        async def receive(client: InferenceEngine) -> None:
            await routes_of(client).update_weights_from_distributed(
                [entry.name for entry in entries],
                [str(entry.dtype).removeprefix("torch.") for entry in entries],
                [entry.shape for entry in entries],
                group_name=name,
                weight_version=version,
            )

        await self._together(f"broadcasting {entries[0].name}", clients, receive, broadcast)

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None:
        joined, self._joined = self._joined, None
        if joined is None:
            return
        for client in clients:
            with contextlib.suppress(EngineError):  # it is gone, or was never in it
                await routes_of(client).destroy_weights_update_group(joined.name)
        await _leave(partial(dist.destroy_process_group, joined.group))

    async def _together(
        self,
        what: str,
        clients: Sequence[InferenceEngine],
        theirs: Callable[[InferenceEngine], Awaitable[None]],
        ours: Callable[[], Awaitable[None]],
    ) -> None:
        """Run both sides of a collective, theirs first. If one fails, cancel the other and leave the group."""
        failures: list[EngineError] = []
        first: list[EngineError] = []  # of an engine, while others have not answered
        ended = False
        try:
            with anyio.move_on_after(self._timeout_s) as limit:
                async with anyio.create_task_group() as group:

                    async def run(part: Callable[[], Awaitable[object]]) -> None:
                        try:
                            await part()
                        except EngineError as error:
                            failures.append(error)
                            group.cancel_scope.cancel()

                    started = _Countdown(len(clients))

                    async def asked(client: InferenceEngine) -> None:
                        started.one_more()
                        try:
                            await theirs(client)
                        except EngineError as error:
                            first.append(
                                WeightSyncError(f"{what} failed at {client.base_url}: {error}")
                            )
                            limit.deadline = min(limit.deadline, anyio.current_time() + _OTHERS_S)
                            raise

                    group.start_soon(run, partial(on_all_engines, clients, what, asked))
                    await started.event.wait()
                    await anyio.lowlevel.checkpoint()  # each request is being written
                    group.start_soon(run, ours)
            ended = not failures and not limit.cancelled_caught
        finally:
            if not ended:
                await self._abandon()
        if failures or first:
            raise (failures or first)[0]
        if not ended:
            problem = f"not over after {self._timeout_s:g} s; an engine hangs, or cannot reach the trainer"
            raise EngineLost(f"{what}: {problem}")

    async def _abandon(self) -> None:
        """Leave a group in which members may still wait, a thread of ours too: abort() frees them."""
        joined, self._joined = self._joined, None
        if joined is not None:
            await _leave(joined.group.abort)


class _Countdown:
    """Sets `event` once `count` have come."""

    def __init__(self, count: int) -> None:
        self._left, self.event = count, anyio.Event()

    def one_more(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.event.set()


async def _leave(function: Callable[[], object]) -> None:
    """Call a function that ends a group, for a bounded time, even if cancelled. A broken group may raise again."""
    with anyio.move_on_after(_LEAVE_S, shield=True), contextlib.suppress(RuntimeError):
        await run_on(None, function)


def _join(
    backend: str, store: dist.Store, world: int, name: str, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    try:
        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            Backend(backend),
            PrefixStore(name, store),
            group_name=GroupName(name),
            timeout=timeout,
        )
    except RuntimeError as error:
        raise WeightSyncError(f"the trainer could not make the process group: {error}") from error
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _address_towards(url: str) -> str:
    """Return this machine's own address on the way to `url`. No packet is sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])
