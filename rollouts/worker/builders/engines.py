"""Build the pool of the run's engines. It checks which server answers, and requests outlive an engine's restart."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from rollouts.config import Config
from rollouts.engines.keys import read_keys
from rollouts.run_dir import RunDir, append_event
from rollouts.training import distributed
from rollouts.training.inference.connect import engine_client
from rollouts.training.inference.http import require
from rollouts.training.inference.inference_engine import InferenceEngine
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.recovery import Recovered
from rollouts.training.inference.pool.replica import Replica
from rollouts.training.inference.pool.router_client import RouterClient
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.worker.builders import EngineUrls


@contextlib.asynccontextmanager
async def open_pool(config: Config, run: RunDir, urls: EngineUrls) -> AsyncIterator[EnginePool]:
    """Yield the engines, on rank 0; an empty pool on other ranks."""
    api_key, admin_key = read_keys()
    kind = config.engine.kind if config.engine else "sglang"
    timeout_s = config.limits.sample_timeout_s
    clients = [
        engine_client(kind, url, timeout_s=timeout_s, api_key=api_key, admin_key=admin_key)
        for url in (urls.engines if distributed.rank() == 0 else ())
    ]
    router = None
    if urls.router is not None and clients and config.engine is not None:
        first = clients[0]
        assert isinstance(first, SGLangEngine), "SGLang's own router serves SGLang alone"
        router = RouterClient(
            urls.router,
            first,
            requests_max=len(clients) * config.engine.max_running_requests,
            timeout_s=timeout_s,
            api_key=api_key,
            admin_key=admin_key,
        )
    async with build_pool(config, run, clients, router) as pool:
        for replica in pool.replicas:
            await _check_server(config, run, replica)
        yield pool


async def _check_server(config: Config, run: RunDir, replica: Replica) -> None:
    """Ask a server for its kind and version before anything is sampled, and note them.

    Raises EngineError for a version that is not tested, and for another kind than the config's.
    """
    server = await replica.server()
    expected = config.engine.kind if config.engine else server.kind
    need = f"{expected}, as the config's engine: change that, or end what listens and choose another engine.sglang_port"
    require(
        server.kind == expected,
        f"{replica.base_url}: is {server.kind} {server.version}, needs {need}",
    )
    message = f"engine {replica.base_url}: {server.kind} {server.version}"
    if not server.seeds:
        message += ", which does not heed seeds: the same run samples other tokens each time"
    append_event(run, "note", message=message)


def build_pool(
    config: Config,
    run: RunDir,
    clients: Sequence[InferenceEngine],
    router: RouterClient | None = None,
) -> EnginePool:
    """Return a pool that waits for as many restarts as the supervisor may make. Each recovery is an event."""
    limits, restarts_max = config.limits, config.engine.restarts_max if config.engine else 0

    def on_recovered(recovered: Recovered) -> None:
        append_event(run, "engine_recovered", **dataclasses.asdict(recovered))

    one_restart_s = limits.engine_hang_timeout_s + limits.engine_ready_timeout_s
    return EnginePool(
        clients,
        router=router,
        reruns_max=restarts_max,
        recover_timeout_s=one_restart_s * max(1, restarts_max),
        on_recovered=on_recovered,
    )
