"""DataBuffer: prompts in a seeded order that wraps for ever and resumes exactly. No I/O."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from rollouts.data_formats.row import DataError
from rollouts.training.types import Prompt


class DataBuffer:
    """Epoch e goes through all prompts in the order that `random.Random(seed + e)` shuffles them into.

    seed None: 0, or the seed of the loaded state.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int | None = None) -> None:
        if not prompts:
            raise DataError("DataBuffer: no prompts; needs at least one")
        self.prompts = list(prompts)
        self._seed_is_given = seed is not None
        self.seed = 0 if seed is None else seed
        self.fingerprint = _fingerprint(self.prompts)
        self._go_to(epoch=0, offset=0)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def epoch(self) -> int:
        """Return the epoch of the next prompt, from 0."""
        return self._epoch

    def get_prompts(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts. Wraps at the end of an epoch, as often as needed."""
        if count < 0:
            raise ValueError(f"get_prompts({count}): needs >= 0")
        taken: list[Prompt] = []
        while len(taken) < count:
            chunk = self._order[self._offset : self._offset + count - len(taken)]
            taken += [self.prompts[index] for index in chunk]
            self._offset += len(chunk)
            if self._offset == len(self._order):
                self._go_to(epoch=self._epoch + 1, offset=0)
        return taken

    def save_state(self) -> dict[str, Any]:
        """Return the position, and a fingerprint of the prompts, as plain data."""
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "offset": self._offset,
            "fingerprint": self.fingerprint,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the prompts that would have come.

        Raises DataError when the state is of other prompts, of the same ones edited or in another order, or of another
        seed than the one given here; the buffer is then unchanged.
        """
        missing = [key for key in ("seed", "epoch", "offset", "fingerprint") if key not in state]
        if missing:
            raise DataError(f"DataBuffer state lacks {missing}; needs what save_state() returned")
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"DataBuffer state was saved over other prompts: fingerprint {state['fingerprint']}, here "
                f"{self.fingerprint} ({len(self)} prompts). Fix: resume with the same data sets, or start afresh."
            )
        if not 0 <= state["offset"] < len(self) or state["epoch"] < 0:
            where = f"epoch {state['epoch']}, offset {state['offset']}"
            raise DataError(f"DataBuffer state: {where} is outside of {len(self)} prompts")
        if self._seed_is_given and state["seed"] != self.seed:
            raise DataError(
                f"DataBuffer state was saved with seed {state['seed']}, this buffer was given seed {self.seed}: other "
                "prompts would come. Fix: the seed that the run began with, or none, which takes the saved one."
            )
        self.seed = state["seed"]
        self._go_to(epoch=state["epoch"], offset=state["offset"])

    def _go_to(self, *, epoch: int, offset: int) -> None:
        self._epoch, self._offset = epoch, offset
        self._order = list(range(len(self.prompts)))
        random.Random(self.seed + epoch).shuffle(self._order)


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()[:16]
