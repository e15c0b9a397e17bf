"""SGLang's server with the run's keys: python -m rollouts.engines.sglang.launcher <sglang.launch_server's flags>.

SGLang takes its keys from the command line or from a file that it turns into one, and prints all its arguments when it
starts. Here they come from the environment (rollouts/engines/keys.py), and print as '***'. Without them the server
needs none. /server_info, which takes the api key, would answer with both: they are hidden there too. Its stores listen
on loopback alone. Runs in the engine's environment, from the repository's root.
"""

import os
import sys
from collections.abc import Collection
from typing import Any

from rollouts.engines.keys import read_keys
from rollouts.training.stores import bind_all_stores

# the server, and the processes that it starts, which import this again
if __name__ in ("__main__", "__mp_main__"):
    bind_all_stores()


def hidden(value: Any, keys: Collection[str]) -> Any:
    """Return `value`, made of JSON's types, with '***' in place of each of the keys."""
    if isinstance(value, dict):
        return {name: hidden(part, keys) for name, part in value.items()}
    if isinstance(value, list):
        return [hidden(part, keys) for part in value]
    return "***" if isinstance(value, str) and value in keys else value


def _hide(keys: Collection[str]) -> None:
    """Hide the keys in what the server answers about itself, from all of its processes."""
    from sglang.srt.entrypoints import http_server

    plain = http_server.msgspec_to_builtins
    http_server.msgspec_to_builtins = lambda value: hidden(plain(value), keys)


def _reach_itself() -> None:
    """Except loopback from the host's proxies: SGLang asks itself for a first token before it is ready."""
    without = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (without, "127.0.0.1")))


def main(argv: list[str]) -> None:
    """Serve until a signal ends the process; its child processes end with it."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    _reach_itself()
    load_plugins()
    try:
        arguments = prepare_server_args(argv)
        arguments.api_key, arguments.admin_api_key = keys = read_keys()
        _hide([key for key in keys if key])
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
