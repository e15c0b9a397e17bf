"""The guard that a deploy starts in the background. It outlives the deploy, and ends with the last machine."""

import contextlib
import os
import sys
import time

from rollouts.remote.guards import ARMED, use_of


def main() -> None:
    """Guard. Whoever started it is told on the given descriptor once the ledger was looked at."""
    from rollouts.cloud.lease_guard import LeaseGuard

    mouth = int(sys.argv[1])
    guard = LeaseGuard(_say, use_of)
    guard.look()
    if guard.was_read:
        with contextlib.suppress(OSError):  # nobody waits any more
            os.write(mouth, ARMED)
    os.close(mouth)
    guard.run(stay=False)


def _say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
