"""What a pull brings: which checkpoints, and how fast. All else of a run is small, and always comes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from rollouts.remote.errors import DeployError

Checkpoints = Literal["all", "latest", "none"]
UNITS = {
    "": 1024,
    "k": 1024,
    "m": 1024**2,
    "g": 1024**3,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
}
UNITS |= {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3}
RATE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([a-z]{0,3})", re.IGNORECASE)


@dataclass(frozen=True)
class ToBring:
    """Which of a run's checkpoints are brought, and the bandwidth that rsync may use for them."""

    checkpoints: Checkpoints = "all"
    kib_per_s: int | None = None

    @classmethod
    def parse(cls, *, no_checkpoints: bool, only: str | None, bwlimit: str | None) -> "ToBring":
        """Read the options of the command line. Raises DeployError."""
        if only not in (None, "latest"):
            raise DeployError(
                f"--only {only}: no such choice.",
                needed="--only latest: the last checkpoint of each stage",
            )
        if no_checkpoints and only:
            raise DeployError(
                "--no-checkpoints and --only exclude each other.", fix="leave out one of the two"
            )
        checkpoints: Checkpoints = "none" if no_checkpoints else "latest" if only else "all"
        return cls(checkpoints, None if bwlimit is None else _parse_rate(bwlimit))

    @property
    def rsync_options(self) -> tuple[str, ...]:
        return () if self.kib_per_s is None else (f"--bwlimit={self.kib_per_s}",)

    @property
    def words(self) -> list[str]:
        """Return the options of the command line that say the same."""
        which = {"all": [], "latest": ["--only", "latest"], "none": ["--no-checkpoints"]}[
            self.checkpoints
        ]
        return which if self.kib_per_s is None else [*which, "--bwlimit", f"{self.kib_per_s}K"]

    def choose(self, paths: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return (those to bring, those left on the host)."""
        listed = list(paths)
        newest: dict[str, int] = {}
        for stage, step in map(stage_and_step, listed):
            newest[stage] = max(step, newest.get(stage, 0))
        chosen = {"all": listed, "none": []}.get(
            self.checkpoints,
            [path for path in listed if newest[stage_and_step(path)[0]] == stage_and_step(path)[1]],
        )
        return chosen, [path for path in listed if path not in chosen]


EVERYTHING = ToBring()


def stage_and_step(path: str) -> tuple[str, int]:
    """Return the stage and the step of `checkpoints/<stage>/step_<number>`."""
    _, stage, step = PurePosixPath(path).parts
    return stage, int(step.removeprefix("step_"))


def left_note(run_id: str, left: list[str]) -> str:
    """Say which checkpoints lie on the host alone, and what brings them."""
    shown = ", ".join(path.removeprefix("checkpoints/") for path in left[:5])
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    return f"not brought, and on the host alone: {shown}{more}; `deploy pull {run_id}` brings what is left there"


def _parse_rate(text: str) -> int:
    """Return KiB/s: rsync's own words for a rate, in the one form that every rsync knows. Raises DeployError."""
    match = RATE.fullmatch(text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise DeployError(
            f"--bwlimit {text}: not a rate.",
            needed="bytes a second as rsync has them: 500 or 500K (KiB/s), 2.5M (MiB/s), 10MB (10^7 bytes/s)",
        )
    bytes_per_s = float(match[1]) * unit
    if bytes_per_s < 1024:
        raise DeployError(
            f"--bwlimit {text}: too slow to bring anything.",
            needed="at least 1K; none: leave it out",
        )
    return round(bytes_per_s / 1024)
