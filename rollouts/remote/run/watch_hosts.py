"""How busy all hosts of a run are, while it is watched: the others' files are followed beside those of the first."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from rollouts.remote.errors import DeployError
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.follow import follow
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.other_hosts import names_of, on_host
from rollouts.view.reporter import silent

USAGE = "gpu.jsonl"
END_S = 5.0  # after the first host's end, for the last rows of the others
Show = Callable[[dict[str, Any]], None]  # of a row of USAGE, which has the "host"


class OtherHosts:
    """Follows a run on each host beside the first, in a thread of its own. What fails there is that host's to tell."""

    def __init__(self, first: RunConnection, show: Show, policy: RetryPolicy) -> None:
        self._first, self._show, self._policy = first, show, policy
        self._names = names_of(first.entry)
        self._threads = [
            threading.Thread(target=self._follow, args=[rank], daemon=True)
            for rank in range(1, len(self._names))
        ]
        for thread in self._threads:
            thread.start()

    def named(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of the first host's, with its name if there are others."""
        return {"host": self._names[0], **row} if self._names else row

    def close(self) -> None:
        """Let the last rows come, for a while. The threads end with their hosts' part of the run."""
        for thread in self._threads:
            thread.join(END_S)

    def _follow(self, rank: int) -> None:
        with contextlib.suppress(DeployError), contextlib.ExitStack() as stack:
            there = on_host(self._first, str(rank), stack)
            mirror = Mirror(there.entry.mirror)

            def on_file(file: str) -> None:
                for row in mirror.rows(USAGE) if file == USAGE else ():
                    self._show({"host": self._names[rank], **row})

            on_file(USAGE)  # what another command brought
            follow(there, mirror, on_file, silent, self._policy)
