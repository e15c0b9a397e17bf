"""The runs of a host for the page of `deploy ui --remote`: what one looks at is followed into a mirror, read only."""

import contextlib
import dataclasses
import hashlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import Transport
from rollouts.remote.list_runs import host_row
from rollouts.remote.run import registry
from rollouts.remote.run.adopt import copy_descriptions
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.follow import follow
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.open_run import open_run
from rollouts.remote.run.other_hosts import on_host
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.ui_runs import Compared
from rollouts.run_dir import home_dir, valid_run_id
from rollouts.view.reporter import silent
from rollouts.view.ui.run_source import PageError, RunList

KEPT_S = 5.0  # a list is asked for again after that
FIRST_S = 60.0  # for a run's first files
END_S = 3.0  # for the connections, at the end


class HostRuns(Compared):
    """All runs on a host, whoever started them."""

    def __init__(self, target: str) -> None:
        """Ask the host for its runs. Raises DeployError where it cannot be reached."""
        self.title = target
        self._transport: Transport = open_transport(target)
        self._lock = threading.Lock()
        self._followed: dict[str, _Followed] = {}
        self._list, self._listed_at = self._ask(), time.monotonic()

    def _ask(self) -> RunList:
        found = gather_facts(self._transport).runs
        rows = [
            host_row(self.title, row) | {"tags": []}
            for row in found
            if valid_run_id(str(row["run_id"]))
        ]
        return RunList(rows[::-1], [])

    def runs(self) -> RunList:
        """Return the host's runs; where it cannot be reached those of the last answer, and a remark."""
        with self._lock:
            if time.monotonic() - self._listed_at > KEPT_S:
                try:
                    self._list = self._ask()
                except DeployError as error:
                    self._list = RunList(
                        self._list.rows, [f"as last seen: {error.text(launching=False)}"]
                    )
                self._listed_at = time.monotonic()
            return self._list

    def row(self, run_id: str) -> Mapping[str, Any] | None:
        """Return one run of the host as it was last listed."""
        return next((row for row in self.runs().rows if row["run_id"] == run_id), None)

    def directory(self, run_id: str) -> Path:
        """Return the mirror of a run, and follow it from now on. Raises PageError where nothing came."""
        with self._lock:
            followed = self._followed.get(run_id)
            if followed is None or followed.is_over_with_error:
                followed = self._followed[run_id] = _Followed(run_id, self.title)
        return followed.path()

    def remark(self, run_id: str) -> str:
        """Return why a run is not followed any more; "" while it is, or where it has ended."""
        followed = self._followed.get(run_id)
        return followed.error if followed else ""

    def close(self) -> None:
        """End all connections."""
        for followed in self._followed.values():
            followed.end()
        with contextlib.suppress(DeployError, OSError):
            self._transport.close()


class _EndedError(DeployError):
    """Raised into the following when the server ends."""

    def __init__(self) -> None:
        super().__init__("the page's server ends.")


class _Followed:
    """One run that a thread follows into its mirror, from each of its hosts that is known here."""

    def __init__(self, run_id: str, target: str) -> None:
        self._run_id, self._target = run_id, target
        self._directory: Path | None = None
        self._first = threading.Event()
        self._ends = threading.Event()
        self._transports: list[Transport] = []
        self.error = ""
        self._thread = threading.Thread(target=self._work, name=f"follow {run_id}", daemon=True)
        self._thread.start()

    @property
    def is_over_with_error(self) -> bool:
        return bool(self.error) and not self._thread.is_alive()

    def path(self) -> Path:
        self._first.wait(FIRST_S)
        if self._directory is None:
            raise PageError(
                self.error
                or f"{self._target} has not sent anything of {self._run_id} yet: try again"
            )
        return self._directory

    def _work(self) -> None:
        try:
            with open_run(
                self._run_id,
                self._target,
                adopt=False,
                needs_files=True,
            ) as run:
                entry = _mirrored(run.entry)
                self._transports.append(run.transport)
                self._follow(RunConnection(entry, run.python, run.transport))
        except _EndedError:
            pass
        except (DeployError, OSError) as error:
            self.error = (
                error.text(launching=False) if isinstance(error, DeployError) else str(error)
            )
        finally:
            self._first.set()

    def _follow(self, connection: RunConnection) -> None:
        mirror = Mirror(connection.entry.mirror)
        if not connection.entry.mirror.config.exists():
            copy_descriptions(connection.entry, connection.transport)
        for rank in range(1, len(connection.entry.others) + 1):
            name = f"follow {self._run_id} on host {rank}"
            threading.Thread(
                target=self._follow_beside, args=[connection, rank], name=name, daemon=True
            ).start()

        def arrived(message: dict[str, Any]) -> None:
            self._heed_end()
            if message.keys() & {
                "alive",
                "ended",
                "snapshot",
            }:  # all growing files had their turn once
                self._directory = connection.entry.mirror.path
                self._first.set()

        follow(connection, mirror, lambda file: None, silent, self._policy(), on_message=arrived)
        self._directory = connection.entry.mirror.path

    def _follow_beside(self, first: RunConnection, rank: int) -> None:
        """Follow what another host of the run has, its usage above all. What fails there leaves the page without it."""
        # KeyError, TypeError: a record of another version
        with (
            contextlib.suppress(DeployError, OSError, KeyError, TypeError),
            contextlib.ExitStack() as stack,
        ):
            there = on_host(first, str(rank), stack)
            self._transports.append(there.transport)
            mirror = Mirror(there.entry.mirror)
            heed = self._heed_end
            follow(there, mirror, lambda file: None, silent, self._policy(), on_message=heed)

    def _policy(self) -> RetryPolicy:
        return RetryPolicy(total_s=FIRST_S * 60, sleep=self._pause)

    def _heed_end(self, message: object = None) -> None:
        if self._ends.is_set():
            raise _EndedError

    def _pause(self, seconds: float) -> None:
        if self._ends.wait(seconds):
            raise _EndedError

    def end(self) -> None:
        self._ends.set()
        for transport in self._transports:
            with contextlib.suppress(DeployError, OSError):
                transport.close()
        self._thread.join(END_S)


def _mirrored(entry: RunEntry) -> RunEntry:
    """Return the entry with the mirror to fill: its own of a known run, else one in the cache of this machine."""
    if registry.find(entry.run_id) is not None:
        return entry
    host = hashlib.sha256(entry.target.encode()).hexdigest()[:16]
    return dataclasses.replace(
        entry, local_dir=str(home_dir() / "cache" / "mirrors" / host / entry.run_id)
    )
