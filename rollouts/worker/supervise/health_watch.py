"""The health rules over a run that goes on: each finding is a `warning` event. Standard library only."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rollouts.health.live_records import LiveRecords
from rollouts.health.rules import symptoms
from rollouts.run_dir import RunDir

INTERVAL_S = 5.0  # between two looks, or more: a look takes SHARE_MAX of the time at most
SHARE_MAX = 0.05
CLEAR_STEPS = 20  # logged steps without the finding, after which it is told again


class HealthWatch:
    """Applies the rules to one run's records, and tells each finding once for its rule and stage, until it clears."""

    def __init__(self, run: RunDir, event: Callable[..., None]) -> None:
        self._records, self._event = LiveRecords(run), event
        self._due_at = 0.0  # monotonic
        # (rule, stage) -> how many steps the stage had logged when it was found last
        self._found: dict[tuple[str, str], int] = {}

    def look(self, *, now: bool = False) -> list[Mapping[str, Any]]:
        """Look at what is new, where it is time to, or `now`. Return the `warning` events since the last look.

        They are those of the trainer too: all of them, whoever wrote them, come from events.jsonl.
        """
        began = time.monotonic()
        if began < self._due_at and not now:
            return []
        new = self._records.look()
        self._apply()
        took_s = time.monotonic() - began
        self._due_at = time.monotonic() + max(INTERVAL_S, took_s / SHARE_MAX)
        return [row for row in new if row["kind"] == "warning"]

    def _apply(self) -> None:
        records = self._records
        for symptom in symptoms(records):
            place = (symptom.cause, symptom.stage)
            if place not in self._found:
                self._event(
                    "warning",
                    stage=symptom.stage,
                    step=max(records.series(symptom.stage, "tokens_per_s").steps, default=0),
                    cause=symptom.cause,
                    message=f"{symptom.detail}. {symptom.means} What to do: {symptom.fix}",
                )
            self._found[place] = records.logged(symptom.stage)
        for (cause, stage), logged in list(self._found.items()):
            if records.logged(stage) - logged >= CLEAR_STEPS:
                del self._found[cause, stage]
