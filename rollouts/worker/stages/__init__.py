"""The stages of a run, sft and rl: each module builds a `Stage` out of the config, which the trainer runs.

This file stays light: the trainer reads it before anything loads torch.
"""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from rollouts.config import Config
from rollouts.run_dir import RunDir
from rollouts.worker.builders import EngineUrls


class Stage(Protocol):
    """A stage with its model loaded and its data read."""

    async def run(self) -> None:
        """Train from the first step to the last."""


class StageModule(Protocol):
    """What `stages.sft` and `stages.rl` offer."""

    MISTAKES: tuple[type[Exception], ...]  # what a user can mend; their messages name the fix

    def build(
        self, config: Config, run: RunDir, urls: EngineUrls
    ) -> AbstractAsyncContextManager[Stage]:
        """Make the stage ready; leaving the context ends the process group and the backend's thread."""
