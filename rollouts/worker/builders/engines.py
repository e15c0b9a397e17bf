"""The clients of the run's engines: which server answers is checked, and requests outlive an engine's restart."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from rollouts.config import Config
from rollouts.engines.keys import read_keys
from rollouts.run_dir import RunDir, append_event
from rollouts.training import distributed
from rollouts.training.inference.client import EngineClient
from rollouts.training.inference.connect import engine_client
from rollouts.training.inference.http import require
from rollouts.training.inference.resilient import Recovered, ResilientEngine, resilient
from rollouts.training.inference.router import Router
from rollouts.training.inference.sglang import SGLangEngine
from rollouts.worker.builders import EngineUrls


@contextlib.asynccontextmanager
async def open_engines(config: Config, run: RunDir, urls: EngineUrls) -> AsyncIterator[list[ResilientEngine]]:
    """Yield the clients of the engines, on rank 0; none on other ranks."""
    async with contextlib.AsyncExitStack() as stack:
        api_key, admin_key = read_keys()
        kind = config.engine.kind if config.engine else "sglang"
        timeout_s = config.limits.sample_timeout_s
        clients = [
            engine_client(kind, url, timeout_s=timeout_s, api_key=api_key, admin_key=admin_key)
            for url in (urls.engines if distributed.rank() == 0 else ())
        ]
        for client in clients:
            await stack.enter_async_context(client)
            await _check_server(config, run, client)
        router = None
        if urls.router is not None and clients and config.engine is not None:
            first = clients[0]
            assert isinstance(first, SGLangEngine), "SGLang's own router stands before SGLang alone"
            router = Router(
                urls.router,
                first,
                requests_max=len(clients) * config.engine.max_running_requests,
                timeout_s=timeout_s,
                api_key=api_key,
                admin_key=admin_key,
            )
            await stack.enter_async_context(router)
        yield outliving_restarts(config, run, clients, router)


async def _check_server(config: Config, run: RunDir, client: EngineClient) -> None:
    """Ask a server for its kind and version before anything is sampled, and note them.

    Raises EngineError for a version that is not tested, and for another kind than the config's.
    """
    server = await client.server()
    expected = config.engine.kind if config.engine else server.kind
    need = f"{expected}, as the config's engine: change that, or end what listens and choose another engine.sglang_port"
    require(server.kind == expected, f"{client.base_url}: is {server.kind} {server.version}, needs {need}")
    message = f"engine {client.base_url}: {server.kind} {server.version}"
    if not server.seeds:
        message += ", which does not heed seeds: the same run samples other tokens each time"
    append_event(run, "note", message=message)


def outliving_restarts(
    config: Config, run: RunDir, clients: Sequence[EngineClient], router: Router | None = None
) -> list[ResilientEngine]:
    """Return the clients, which wait for as many restarts as the supervisor may make; each recovery is an event."""
    limits, restarts_max = config.limits, config.engine.restarts_max if config.engine else 0

    def on_recovered(recovered: Recovered) -> None:
        append_event(run, "engine_recovered", **dataclasses.asdict(recovered))

    one_restart_s = limits.engine_hang_timeout_s + limits.engine_ready_timeout_s
    return resilient(
        clients,
        reruns_max=restarts_max,
        recover_timeout_s=one_restart_s * max(1, restarts_max),
        on_recovered=on_recovered,
        router=router,
    )
