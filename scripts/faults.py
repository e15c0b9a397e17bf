"""Run the matrix of faults and phases over real sshds, and write what was seen into docs/faults.md.

    scripts/faults [--only WORD] [--jobs N] [--minutes M]     every cell, or those whose name has the word
    scripts/fault_walk --minutes M [--seed S]                 cells and moments at random

Exit 0 only if every cell that ran held. Needs no GPU; root for full disks and the kernel's own kill, which are left out
else. A cell takes ten seconds where nothing else runs.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from tests.faults.cells import CELLS, FAULTS, PHASES, run_cell
from tests.faults.lab import make_shared

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Faults

<!-- made by scripts/faults -->

```sh
scripts/faults --jobs 2
```

A laptop and a host with a real sshd on loopback, a link between them that delays, cuts and swallows, the real
command and the real worker; a stand-in trains. After each fault, `deploy attach` until the run is at its end. Then four
things have to hold. No run is lost: it is done, or, where the fault itself ends it, ended. No byte of a log or
metric is lost or doubled. No process is left. No success is reported that was none.

## What was seen

"""
TAIL = """
An entry is how the run ended, where all four held. An empty one cannot happen, and `not run` was not tried that day.

A lost packet holds up what is behind it for a quarter of a second, as TCP does. Clocks jump for all processes of a
side, which a preloaded `tests/faults/clock.c` does, and stay so. The kernel ends a trainer whose memory cgroup is full.
A disk is a small tmpfs, full for two seconds; both need root. A reboot ends sshd and every process of the run.

## Not shown here

Loss inside of the kernel (`tc netem`), and a machine that really boots. Damaged checkpoints are in
`tests/remote/test_tolerance.py`, uploads and pulls that are cut in `test_upload_resumes.py` and `test_pull_resumes.py`,
disks that stay full in `test_local_faults.py`, `test_sync_code.py` and `tests/worker/test_full_disk.py`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cells with this in `fault / phase`")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument(
        "--minutes", type=float, default=24 * 60.0, help="no cell begins after so many"
    )
    parser.add_argument(
        "--walk", action="store_true", help="random cells at random moments, until the time is up"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of the walk; else a new one, which is printed"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        lab = Lab(Path(place), deadline)
        if arguments.walk:
            return lab.walk(
                arguments.jobs, random.SystemRandom().randrange(1 << 32), arguments.seed
            )
        cells = [cell for cell in CELLS if arguments.only in " / ".join(cell)]
        # where the time is short, some of each kind
        mixed = random.Random(0).sample(cells, len(cells))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            seen = dict(zip(mixed, pool.map(lambda cell: lab.try_cell(*cell), mixed), strict=True))
        if not arguments.only:
            PAGE.write_text(page(seen), encoding="utf-8")
            print(f"wrote {PAGE.relative_to(ROOT)}")
        return 1 if any(text.startswith("BROKE") for text in seen.values()) else 0


class Lab:
    """Where cells run, until a deadline."""

    def __init__(self, place: Path, deadline: float) -> None:
        self._place, self._deadline = place, deadline
        self._shared = make_shared(_made(place / "shared"))

    def try_cell(self, fault: str, phase: str, pause_s: float = 0.0) -> str:
        """Return how the run ended, "BROKE: …" for what did not hold, "not run" after the deadline."""
        if time.monotonic() > self._deadline:
            return "not run"
        directory = self._place / f"cell{time.monotonic_ns()}"
        began = time.monotonic()
        try:
            said = run_cell(self._shared, directory, fault, phase, pause_s=pause_s)
        except Exception as error:  # an assertion, a time-out: told with the others
            traceback.print_exc()
            said = (
                f"BROKE: {str(error).splitlines()[0][:400] if str(error) else type(error).__name__}"
            )
        print(
            f"{fault} / {phase} + {pause_s:.2f} s: {said} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        return said

    def walk(self, jobs: int, new_seed: int, seed: int | None) -> int:
        """Try random cells at random moments until the deadline. Returns the exit code."""
        seed = new_seed if seed is None else seed
        print(f"seed={seed}", flush=True)
        rng, broken, count = random.Random(seed), 0, 0
        with ThreadPoolExecutor(jobs) as pool:
            while time.monotonic() < self._deadline:
                steps = [(*rng.choice(CELLS), rng.random() * 2) for _ in range(jobs)]
                said = list(pool.map(lambda step: self.try_cell(*step), steps))
                broken += sum(text.startswith("BROKE") for text in said)
                count += len(said)
        print(f"{count} faults, {broken} broke")
        return 1 if broken else 0


def page(seen: dict[tuple[str, str], str]) -> str:
    """Return docs/faults.md for what was seen."""
    ran = sum(text != "not run" for text in seen.values())
    broke = sum(text.startswith("BROKE") for text in seen.values())
    rows = [["fault", *PHASES], ["---"] * (1 + len(PHASES))]
    rows += [[fault, *(_entry(seen, fault, phase) for phase in PHASES)] for fault in FAULTS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    counts = f"{len(seen)} cells, {ran} run on {date.today()}, {broke} of them broke.\n\n"
    return f"{HEAD}{counts}{table}\n{TAIL}"


def _entry(seen: dict[tuple[str, str], str], fault: str, phase: str) -> str:
    return seen.get((fault, phase), "not run" if phase in FAULTS[fault].phases else "")


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
