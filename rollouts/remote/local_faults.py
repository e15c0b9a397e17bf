"""What goes wrong on this machine, told like any other error: a full disk, a file that cannot be written, a bug.

One place turns every exception that is not ours into one message, with what it means for the run. `RunProgress` is
how far the run has come; whatever leaves `as_deploy_errors()` says so.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rollouts.remote.errors import DeployError, Problem
from rollouts.run_dir import home_dir

FULL = (errno.ENOSPC, errno.EDQUOT)
Reached = Literal["nothing", "registered", "launching", "launched", "interrupted", "ended"]


@dataclass
class RunProgress:
    """How far a verb's run has come: set on the way, told when something interrupts it."""

    run_id: str = ""
    target: str = ""
    reached: Reached = "nothing"

    @property
    def started(self) -> bool:
        return self.reached in ("launching", "launched", "interrupted", "ended")

    def sentence(self) -> str:
        """Return what is true of the run now, and what goes on with it; "" if there is no run."""
        run, target = self.run_id, self.target
        go_on = f"`deploy attach {run}` goes on with it, `deploy forget {run}` drops it"
        return {
            "nothing": "",
            "registered": f"{run} was not launched: {go_on}",
            "launching": f"whether {run} was launched is not known: `deploy attach {run}` finds out",
            "launched": f"the run goes on on {target}: `deploy attach {run}`",
            "interrupted": "",
            "ended": f"the run has ended, and its results are on {target}: `deploy pull {run}`",
        }[self.reached]


class Interrupted(DeployError):
    """Ctrl-C without a launched run: ends the command with 130."""

    def text(self, *, launching: bool = True) -> str:
        return super().text(launching=launching).removeprefix("error: ")

    @property
    def exit_code(self) -> int:
        return 130


@contextlib.contextmanager
def as_deploy_errors(
    run_id: str = "", target: str = "", reached: Reached = "nothing"
) -> Iterator[RunProgress]:
    """Let nothing out but DeployError, SystemExit and a broken pipe, each with the run's state."""
    progress = RunProgress(run_id, target, reached)
    try:
        yield progress
    except (BrokenPipeError, SystemExit):
        raise
    except DeployError as error:
        error.started = error.started or progress.started
        error.standing = error.standing or progress.sentence()
        error.run_id = error.run_id or progress.run_id
        error.target = error.target or progress.target
        raise
    except KeyboardInterrupt:
        raise _with(Interrupted("interrupted."), progress) from None
    except OSError as error:
        problem = os_problem(error)
        raise _with(DeployError.of([problem]), progress) from None
    except Exception as error:
        raise _with(unexpected(error), progress) from error


def _with(error: DeployError, progress: RunProgress) -> DeployError:
    error.started, error.standing = progress.started, progress.sentence()
    return error


def os_problem(error: OSError) -> Problem:
    """Return an error of this machine's own files as a problem, with the path and the room there."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    words = error.strerror or str(error) or type(error).__name__
    where = f": {path}" if path else "."
    room = _room(path) if path else ""
    if error.errno == errno.ENOENT and not path and not _is_somewhere():
        return Problem("the directory that you are in is gone.", fix="cd to one that is there")
    if error.errno in FULL:
        return Problem(
            f"this machine's disk is full{where}",
            found=f"{words}{room}",
            fix="free some space here, or move the results to a larger disk (output.save_dir)",
        )
    if error.errno == errno.EROFS:
        return Problem(
            f"this machine cannot write there{where}",
            found=f"{words}{room}",
            fix="use another directory",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return Problem(
            f"this machine's user may not use that file{where}",
            found=words,
            fix="check who owns it, and its mode",
        )
    return Problem(f"a file of this machine cannot be used{where}", found=words)


def _is_somewhere() -> bool:
    """Return whether this process's working directory is there."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _room(path: str) -> str:
    """Return `, 0.0 MiB free in /small`, for the nearest directory that exists."""
    place = Path(path)
    try:
        while not place.is_dir() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
    except OSError:
        return ""
    return (
        f"; {free} bytes free in {place}"
        if free < 1 << 20
        else f"; {free / 2**20:.0f} MiB free in {place}"
    )


def unexpected(error: BaseException) -> DeployError:
    """Return the error for an exception that was not expected, in one line; its traceback goes to a file."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    what = " ".join(str(error).split())[:500]
    return DeployError(
        f"deploy itself failed: {type(error).__name__}{': ' if what else ''}{what}{place}",
        found=_write_traceback(error),
        fix="please report it with that file",
    )


def _write_traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for place in (_tracebacks, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):
            directory = place()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = directory / f"deploy-{name}"
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
            return f"traceback: {file}"
    return f"its traceback could not be written; the last of it:\n{text[-1500:]}"


def _tracebacks() -> Path:
    return home_dir() / "tracebacks"
