"""Environments that a config names: two turns each, whatever the policy says."""

from typing import Any

import anyio

from rollouts.agents.environment import Reply
from rollouts.training.types import Prompt


class TwoTurns:
    """Says "again" once. The first turn earns 0.25, the second 0.75 if the policy said anything."""

    def __init__(self) -> None:
        self.turns = 0

    def tools(self) -> list[dict[str, Any]]:
        return []

    async def start(self, prompt: Prompt) -> list[dict[str, Any]]:
        assert isinstance(prompt, dict)
        return list(prompt["messages"])

    async def respond(self, message: dict[str, Any]) -> Reply:
        self.turns += 1
        if self.turns == 1:
            return Reply([{"role": "user", "content": "again"}], done=False, reward=0.25)
        return Reply([], done=True, reward=0.75 if message["content"] else 0.0)


class Broken(TwoTurns):
    async def respond(self, message: dict[str, Any]) -> Reply:
        return Reply([{"role": "user", "content": message["no such key"]}], done=False)


class NeverStarts(TwoTurns):
    async def start(self, prompt: Prompt) -> list[dict[str, Any]]:
        await anyio.sleep_forever()
        raise AssertionError


def unmade() -> TwoTurns:
    raise OSError("no database")
