"""SGLang's router with the run's key: python -m rollouts.engines.sglang.router_launcher <its own flags>.

The flags are those of sglang_router.launch_router. That launcher imports all of SGLang, which the router does not need,
and which fails on a CPU without cpu_launcher.py.

The router samples for callers with the api key, and sends the same key to the replicas. It reads the key from the
environment (rollouts/engines/keys.py), since every user of the host can read a command line. Runs in the engine's
environment, from the repository's root.
"""

import argparse
import http.client
import resource
import socket
import sys
import time
import urllib.request

from rollouts.engines.keys import read_keys

POLL_S = 0.2
ASK_TIMEOUT_S = 2.0


def main(argv: list[str]) -> None:
    """Wait until all replicas answer, then serve until a signal ends the process."""
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    parser = argparse.ArgumentParser(prog="rollouts.engines.sglang.router_launcher")
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    arguments = RouterArgs.from_cli_args(parser.parse_args(argv), use_router_prefix=False)
    arguments.api_key, _ = read_keys()
    # Its metrics cannot be turned off; by default they are served on port 29000 of all addresses.
    arguments.prometheus_host, arguments.prometheus_port = (
        arguments.host,
        _free_port(arguments.host),
    )
    _allow_many_connections()
    for url in arguments.worker_urls:
        _await_replica(url)
    Router.from_args(arguments).start()


def _await_replica(url: str) -> None:
    """Return once it is ready. The router polls too, but ever less often: every ten seconds after a minute."""
    # http_proxy is not for our own host
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with direct.open(f"{url}/ready", timeout=ASK_TIMEOUT_S):
                return
        except (OSError, http.client.HTTPException):
            # not there yet; urllib's HTTPError, a 503, is an OSError too
            time.sleep(POLL_S)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _allow_many_connections() -> None:
    """Raise the limit of open files: a request takes two, and hosts often allow a process 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main(sys.argv[1:])
