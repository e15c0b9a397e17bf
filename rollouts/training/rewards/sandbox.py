"""Runs a Python program that a model wrote, with few rights and hard limits. Blocking; Linux on x86_64 or aarch64.

The program is one process in its own directory, deleted after. The kernel refuses it new processes, sockets, signals to
others and, with Landlock (Linux 5.13), every file outside that directory but Python's. Time, memory and output are
bounded. docs/reference/rewards.md says what this does not stop.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollouts.training.rewards.reward_fn import RewardError

CHILD = Path(__file__).with_name("sandbox_child.py")
MIB = 1 << 20


class SandboxError(RewardError):
    """The sandbox could not be put in place; the program did not run."""


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    timeout_s: float = 10.0  # of the wall clock; CPU time has the same limit, rounded up
    memory_mib: int = 1024  # address space, all threads together
    file_mib: int = 16  # of one file, and of the output and of the errors each
    output_characters: int = 1 << 20  # read of each


@dataclass(frozen=True)
class Execution:
    """How a program ended."""

    # negative: the signal that ended it; None: it was killed at the time limit
    exit_code: int | None
    stdout: str  # as far as `SandboxLimits.output_characters`
    stderr: str

    @property
    def timed_out(self) -> bool:
        return self.exit_code is None


def run_python(program: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> Execution:
    """Run `program` with this interpreter and its packages. Raises SandboxError where it cannot be confined."""
    limits = limits or SandboxLimits()
    rights = {
        "memory_bytes": limits.memory_mib * MIB,
        "cpu_s": int(limits.timeout_s) + 1,
        "file_bytes": limits.file_mib * MIB,
    }
    with _directory() as parent:
        work, files = (
            parent / "work",
            [parent / name for name in ("stdin", "stdout", "stderr", "confined")],
        )
        work.mkdir()
        (work / "program.py").write_text(program, encoding="utf-8", errors="replace")
        files[0].write_text(stdin, encoding="utf-8", errors="replace")
        with contextlib.ExitStack() as stack:
            modes = ("rb", "wb", "wb", "wb")
            source, out, err, note = (
                stack.enter_context(open(*pair)) for pair in zip(files, modes, strict=True)
            )
            process = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), json.dumps(rights), str(note.fileno())],
                cwd=work,
                env={
                    "PATH": os.defpath,
                    "HOME": str(work),
                    "LANG": "C.UTF-8",
                    "OMP_NUM_THREADS": "1",
                },
                stdin=source,
                stdout=out,
                stderr=err,
                pass_fds=(note.fileno(),),
                start_new_session=True,
            )
            try:
                exit_code: int | None = process.wait(limits.timeout_s)
            except subprocess.TimeoutExpired:
                exit_code = None
            finally:
                process.kill()  # it has no children
                process.wait()
        stdout, stderr, confined = (_read(file, limits.output_characters) for file in files[1:])
    # the child itself writes it: a program can end in any way
    if not confined and exit_code is not None:
        raise SandboxError(f"cannot run a program safely on this machine: {stderr.strip()}")
    return Execution(exit_code, stdout, stderr)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Yield a fresh directory and remove it after.

    Programs remove it: shutil fails at trees deeper than Python's recursion limit, and at unreadable directories.
    """
    directory = Path(tempfile.mkdtemp(prefix="rollouts-sandbox-"))
    try:
        yield directory
    finally:
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            if directory.exists():
                subprocess.run(
                    [*command, str(directory)],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                )


def _read(file: Path, characters: int) -> str:
    with file.open(encoding="utf-8", errors="replace", newline="") as text:
        return text.read(characters)
