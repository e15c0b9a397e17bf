"""The user's own command at a run's end, `output.on_end`: what it is, and how long the run's end may take for it.

Standard library only.
"""

import json

from rollouts.plain_files import read_plain
from rollouts.run_dir import RunDir

ON_END_S = 60.0  # the command is ended after so long
KILL_AFTER_S = 2.0  # between asking what is left of it to end and killing it
MARGIN_S = 15.0  # beyond both: the kernel may take its time over a SIGKILL


def on_end_command(run: RunDir) -> str | None:
    """Return the command that its config has; None for none, in a config of an earlier version, or one that is gone."""
    try:
        command = json.loads(read_plain(run.config))["output"].get("on_end")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return command if isinstance(command, str) else None


def room_s(run: RunDir) -> float:
    """Return how much longer than without its command a run may take to end."""
    return 0.0 if on_end_command(run) is None else ON_END_S + KILL_AFTER_S + MARGIN_S
