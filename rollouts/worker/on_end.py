"""What a run's end waits for: the user's commands `output.on_end` and `output.on_warning`, and its trackers.

Standard library only.
"""

import json
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.run_dir import RunDir

ON_END_S = 60.0  # the command is ended after so long
ON_WARNING_S = 60.0  # likewise
ON_WARNING_END_S = 5.0  # at the run's end, for all the warnings that were not told yet
KILL_AFTER_S = 2.0  # between asking what is left of it to end and killing it
MARGIN_S = 15.0  # beyond both: the kernel may take its time over a SIGKILL


def on_end_command(run: RunDir) -> str | None:
    """Return the command that its config has; None for none, in a config of an earlier version, or one that is gone."""
    return _command(run, "on_end")


def on_warning_command(run: RunDir) -> str | None:
    """Return the command that its config has, likewise."""
    return _command(run, "on_warning")


def trackers_room_s(run: RunDir) -> float:
    """Return how long a run's end may wait for its trackers, until nothing is left of them."""
    config = _config(run)
    has = config.get("output", {}).get("trackers") or config.get("output", {}).get("use_wandb")
    grace_s = config.get("limits", {}).get("stop_grace_s", 0.0)
    return 3 * grace_s + MARGIN_S if has else 0.0


def _command(run: RunDir, field: str) -> str | None:
    command = _config(run).get("output", {}).get(field)
    return command if isinstance(command, str) else None


def _config(run: RunDir) -> dict[str, dict[str, Any]]:
    """Return the sections of its config; {} for one that is gone or damaged."""
    try:
        found = json.loads(read_plain(run.config))
        return {name: section for name, section in found.items() if isinstance(section, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def room_s(run: RunDir) -> float:
    """Return how much longer than without its commands and trackers a run may take to end."""
    at_end = 0.0 if on_end_command(run) is None else ON_END_S + KILL_AFTER_S + MARGIN_S
    return at_end + on_warning_room_s(run) + trackers_room_s(run)


def on_warning_room_s(run: RunDir) -> float:
    """Return how long a run's end may wait for its command about warnings."""
    return 0.0 if on_warning_command(run) is None else ON_WARNING_END_S
