"""A reward worker's process: `python -m rollouts.training.rewards.worker_process DOTTED_PATH FILE_DESCRIPTOR`."""

import sys
from multiprocessing.connection import Connection
from typing import Any

from rollouts.training.rewards.reward_fn import resolve
from rollouts.training.user_code import USER_ERRORS, describe, find_user_code


def serve(dotted_path: str, connection: Connection) -> None:
    """Answer samples until the other end is closed."""
    try:
        function = resolve(dotted_path)
    except USER_ERRORS as error:  # sent, else the reason would be lost with this process
        connection.send(("error", describe(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            sample = connection.recv()
        except EOFError:
            return
        try:
            value = function(sample)
            reply: tuple[str, Any] = ("value", None if value is None else float(value))
        except USER_ERRORS as error:
            reply = ("error", describe(error))
        connection.send(reply)


if __name__ == "__main__":
    find_user_code()
    serve(sys.argv[1], Connection(int(sys.argv[2])))
