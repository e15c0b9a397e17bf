"""How long `deploy offers` takes over stand-ins of the four providers, each of whose answers takes 100 ms.

    python -m benchmarks.offers

The process as a whole, from its start to its end, five times. It has to stay under a second.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cloud.conftest import CLOUDS, variables

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 1.0


def main() -> int:
    """Measure, print, and return 1 where the median is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-s", type=float, default=0.1, help="of each answer")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    clouds = {name: cloud() for name, cloud in CLOUDS.items()}
    for cloud in clouds.values():
        cloud.latency_s = options.latency_s
    found = []
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, **variables(clouds, Path(home))}
        for _ in range(options.times):
            began = time.monotonic()
            command = [sys.executable, str(ROOT / "deploy.py"), "offers", "--gpu", "H100", "--json"]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            found.append(time.monotonic() - began)
    median = statistics.median(found)
    calls = sum(len(cloud.requests) for cloud in clouds.values()) // options.times
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = (used.ru_utime + used.ru_stime) / options.times
    each = ", ".join(f"{seconds:.2f}" for seconds in found)
    print(
        f"{median:.2f} s median of {each}; {calls} calls of {options.latency_s:g} s; {cpu_s:.2f} s of CPU"
    )
    return int(median > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
