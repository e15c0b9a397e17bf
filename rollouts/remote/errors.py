"""What the control side says when something is wrong: the fact, what was found, what is needed, and the fix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One reason why something cannot go on. `message` is a sentence; the rest is shown indented under it."""

    message: str
    found: str = ""
    needed: str = ""
    fix: str = ""

    def text(self) -> str:
        rows = (("found", self.found), ("needed", self.needed), ("fix", self.fix))
        lines = [self.message]
        for name, value in rows:
            if value:
                first, *rest = value.splitlines()
                lines += [f"  {name:<7} {first}", *(f"          {line}" for line in rest)]
        return "\n".join(lines)


class DeployError(Exception):
    """Ends the command with its message. `exit_code` is 2 as long as nothing was started, else 1."""

    def __init__(
        self,
        message: str,
        *,
        found: str = "",
        needed: str = "",
        fix: str = "",
        more: Sequence[Problem] = (),
        started: bool = False,
    ) -> None:
        super().__init__(message)
        self.problems = (Problem(message, found, needed, fix), *more)
        self.started = started

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "DeployError":
        first, *more = problems
        return cls(first.message, found=first.found, needed=first.needed, fix=first.fix, more=more)

    @property
    def exit_code(self) -> int:
        return 1 if self.started else 2

    def text(self) -> str:
        """As printed: style.md's form, every problem, and whether anything was started."""
        lines = [f"error: {problem.text()}" for problem in self.problems]
        return "\n".join([*lines, *(() if self.started else ("Nothing was started.",))])

    def to_json(self) -> dict[str, Any]:
        problems = [{"message": p.message, "found": p.found, "needed": p.needed, "fix": p.fix} for p in self.problems]
        return {"type": "error", "problems": problems, "started": self.started, "exit_code": self.exit_code}


class TransportError(DeployError):
    """The host cannot be reached, or the connection was lost. `lost`: it worked before, trying again may help."""

    def __init__(self, message: str, *, lost: bool = False, found: str = "", needed: str = "", fix: str = "") -> None:
        super().__init__(message, found=found, needed=needed, fix=fix)
        self.lost = lost
