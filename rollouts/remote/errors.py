"""What the control side says when something is wrong: the fact, what was found, what is needed, and the fix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.view.escape import escaped


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
    """Ends the command with its message. `exit_code` is 2 as long as nothing was started, else 1.

    `standing`: what is true of the run now, and the command that goes on with it. `as_deploy_errors` fills it in, and
    `run_id` and `target`.
    """

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
        self.standing = ""
        self.run_id, self.target = "", ""  # of the run that it is about, and of its host

    @classmethod
    def of(cls, problems: Sequence[Problem], *, started: bool = False) -> "DeployError":
        first, *more = problems
        return cls(
            first.message,
            found=first.found,
            needed=first.needed,
            fix=first.fix,
            more=more,
            started=started,
        )

    @property
    def exit_code(self) -> int:
        return 1 if self.started else 2

    def text(self, *, launching: bool = True) -> str:
        """Return it as printed: every problem in the form message, found, needed, fix; and where the run is.

        `launching`: the command was to start a run, so that "Nothing was started." answers a question.
        """
        lines = [f"error: {escaped(problem.text())}" for problem in self.problems]
        nothing = ("Nothing was started.",) if launching and not self.started else ()
        return "\n".join([*lines, *filter(None, (escaped(self.standing),)), *nothing])

    def to_json(self) -> dict[str, Any]:
        problems = [
            {"message": p.message, "found": p.found, "needed": p.needed, "fix": p.fix}
            for p in self.problems
        ]
        return {
            "type": "error",
            "problems": problems,
            "started": self.started,
            "exit_code": self.exit_code,
            "standing": self.standing,
        }


class TransportError(DeployError):
    """The host cannot be reached, or the connection was lost. `lost`: it worked before, trying again may help."""

    def __init__(
        self, message: str, *, lost: bool = False, found: str = "", needed: str = "", fix: str = ""
    ) -> None:
        super().__init__(message, found=found, needed=needed, fix=fix)
        self.lost = lost


class UnreachableError(DeployError):
    """The host was tried for as long as the retry policy allows; nothing else that needs it will work either."""


@dataclass(frozen=True)
class Gone:
    """Why a rented machine will not answer again."""

    why: str
    taken: bool  # by its provider; not ended by a guard, a limit or a command


class HostGoneError(DeployError):
    """The run's host was a rented machine, and is gone for good: the run was interrupted, and does not go on there."""

    def __init__(self, run_id: str, target: str, gone: Gone) -> None:
        super().__init__(
            f"{target} is gone, and {run_id} was interrupted.",
            found=gone.why,
            fix=f"deploy resume {run_id} goes on from its last checkpoint here, on another machine",
            started=True,
        )
        self.run_id, self.gone = run_id, gone


class MismatchError(DeployError):
    """What is here and what is on the host are not copies of the same run: neither is written over the other."""


def unreadable(error: OSError) -> DeployError:
    """Return an error that says which file of the repository cannot be read."""
    if isinstance(error, FileNotFoundError):
        message, fix = (
            f"{error.filename!r} went away while the code was read.",
            "run the same command again",
        )
    else:
        message, fix = (
            f"{error.filename!r} cannot be read.",
            "make it readable, or let git ignore it",
        )
    return DeployError(
        message,
        found=error.strerror or "",
        needed="every file that git lists goes to the host",
        fix=fix,
    )
