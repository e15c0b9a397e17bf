"""SGLang's server with the run's keys: python -m rollouts.engines.sglang.launcher <sglang.launch_server's flags>.

SGLang takes its keys from the command line or from a file that it turns into one, and prints all its arguments when it
starts. Here they come from the environment (rollouts/engines/keys.py), and print as '***'. Without them the server asks
for none. Runs in the engine's environment, from the repository's root.
"""

import os
import sys

from rollouts.engines.keys import read_keys


def main(argv: list[str]) -> None:
    """Serve until a signal ends it; its child processes end with it."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        arguments = prepare_server_args(argv)
        arguments.api_key, arguments.admin_api_key = read_keys()
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
