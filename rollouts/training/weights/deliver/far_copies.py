"""Weights for engines on other hosts than the trainer: a copy of each directory there, over HTTP."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import anyio

from rollouts.engines.send_model import SendError, keep_only, send_directory
from rollouts.training.devices import run_on
from rollouts.training.inference.http import EngineLost, WeightSyncError


class FarCopies:
    """Has the receiver of each host take what is delivered. `receivers`: their URLs, at their engines' addresses."""

    def __init__(self, receivers: Sequence[str], *, key: str | None) -> None:
        self._receivers: Mapping[str | None, str] = {
            urlsplit(url).hostname: url for url in receivers
        }
        self._key = key
        self._sent: dict[tuple[str, Path], str] = {}  # by receiver and directory: its path there

    async def send(self, directory: Path) -> None:
        """Return when all hosts have the directory. Raises WeightSyncError."""
        failures: list[WeightSyncError] = []

        async def one(url: str) -> None:
            try:
                await self._send(url, directory)
            except WeightSyncError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            for url in self._receivers.values():
                group.start_soon(one, url)
        if failures:
            raise failures[0]

    async def path_for(self, engine_url: str, directory: Path) -> str:
        """Return where the engine's host has the directory; it is sent where it is not there yet."""
        url = self._receivers.get(urlsplit(engine_url).hostname)
        if url is None:
            return str(directory)
        if (url, directory) not in self._sent:
            await self._send(url, directory)
        return self._sent[url, directory]

    async def keep_only(self, directory: Path) -> None:
        """Have all hosts remove the other directories. Raises WeightSyncError."""
        self._sent = {key: path for key, path in self._sent.items() if key[1] == directory}
        for url in self._receivers.values():
            try:
                await run_on(None, partial(keep_only, url, directory.name, key=self._key))
            except SendError as error:
                raise WeightSyncError(str(error)) from error

    async def _send(self, url: str, directory: Path) -> None:
        send = partial(send_directory, url, directory, directory.name, key=self._key)
        try:
            self._sent[url, directory] = await run_on(None, send)
        except SendError as error:
            lost = EngineLost(str(error))
            raise WeightSyncError(f"weights did not reach another host: {error}") from lost
