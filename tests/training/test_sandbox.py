"""Programs in the sandbox, and rewards made of them: real processes that try what they must not."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollouts.training import rewards
from rollouts.training.rewards import sandbox
from rollouts.training.rewards.sandbox import SandboxError, SandboxLimits, run_python
from rollouts.training.types import Sample

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sandbox is the kernel's: Linux"
)
LIMITS = SandboxLimits(timeout_s=120.0, memory_mib=512, file_mib=1)
CALL = "import ctypes; c = ctypes.CDLL(None); assert"
ADD_KEY = {"x86_64": 248, "aarch64": 217}.get(platform.machine())
LANDLOCK = (
    "landlock" in Path("/sys/kernel/security/lsm").read_text()
    if Path("/sys/kernel/security/lsm").exists()
    else None
)


def test_a_program_reads_and_writes() -> None:
    """Goal: ordinary programs run: input, packages of this environment, threads, files of their own. Red with -S."""
    program = (
        "import numpy, threading, sys\n"
        "open('note', 'w').write(input()); print(open('note').read()[::-1])\n"
        "thread = threading.Thread(target=lambda: print(int(numpy.ones(3).sum()))); thread.start(); thread.join()\n"
        "sys.exit(3)\n"
    )
    run = run_python(program, stdin="abc\n", limits=SandboxLimits(timeout_s=120.0))
    assert (run.exit_code, run.stdout) == (3, "cba\n3\n"), run.stderr


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.chmod(os.getcwd(), 0o777)", "PermissionError"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
            "not allowed to raise",
        ),
        (f"{CALL} c.unshare(0x10000000) == 0, 'denied'", "denied"),
        ("import socket; socket.socketpair()", "PermissionError"),
        ("import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
        ("import fcntl; fcntl.fcntl(1, 10, 9)", "PermissionError"),  # F_SETSIG
        ("import os; os.sched_setaffinity(os.getppid(), [0])", "PermissionError"),
        ("import os; os.utime('.')", "PermissionError"),
        ("import os; os.setxattr('.', 'user.a', b'b')", "PermissionError"),
        (f"{CALL} c.shmget(0, 4096, 0o1600) >= 0, 'denied'", "denied"),
        (f"{CALL} c.syscall({ADD_KEY}, b'user', b'a', b'b', 1, -3) >= 0, 'denied'", "denied"),
        ("import os; os.memfd_create('a')", "PermissionError"),
        (f"{CALL} c.syscall(447, 0) >= 0, 'denied'", "denied"),  # memfd_secret
        # F_SETPIPE_SZ
        ("import fcntl, os; fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)", "PermissionError"),
        # F_SETLEASE
        ("import fcntl, os; fcntl.fcntl(open(os.__file__), 1024, 0)", "PermissionError"),
        (f"{CALL} c.inotify_init() >= 0, 'denied'", "denied"),
        # PR_SET_PDEATHSIG: it would outlive its parent
        (f"{CALL} c.prctl(1, 0, 0, 0, 0) == 0, 'denied'", "denied"),
        (
            "import fcntl, os; fcntl.ioctl(open(os.__file__), 0x40086602, b'\\0' * 8)",
            "PermissionError",
        ),  # FS_IOC_SETFLAGS
        ("text = ' ' * (1 << 30)", "MemoryError"),
        ("print('a' * (2 << 20))", "File too large"),
    ],
    ids=lambda item: item[:40],
)
def test_what_a_program_may_not_do(program: str, error: str) -> None:
    """Goal: each right is gone. Red without limit_resources; without filter_system_calls os.kill ended the tests."""
    run = run_python(program, limits=LIMITS)
    assert run.exit_code == 1 and error in run.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(LANDLOCK is False, reason="this kernel has no Landlock")
@pytest.mark.parametrize(
    "how", ["open({path!r}).read()", "open({path!r}, 'w')", "import os; os.listdir({parent!r})"]
)
def test_files_of_the_user_are_out_of_reach(tmp_path: Path, how: str) -> None:
    """Goal: neither read, nor written, nor listed. Red without restrict_files."""
    secret = tmp_path / "secret"
    secret.write_text("token")
    run = run_python(how.format(path=str(secret), parent=str(tmp_path)), limits=LIMITS)
    assert (
        run.exit_code == 1 and "Permission denied" in run.stderr and secret.read_text() == "token"
    )


@pytest.mark.skipif(LANDLOCK is False, reason="this kernel has no Landlock")
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        "import os; os.truncate({path!r}, 0)",
        "import os; os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "open({path!r}, 'r+')",
        "import os; os.open({path!r}, os.O_CREAT | os.O_TRUNC)",
        "import os; os.rename('program.py', {path!r})",
        "import os; os.link({path!r}, 'mine'); os.truncate('mine', 0)",
        "import os; os.symlink({path!r}, 'mine'); os.truncate('mine', 0)",
    ],
)
def test_files_of_the_user_stay_whole_on_older_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int, how: str
) -> None:
    """Goal: with the Landlock of Linux 5.13 to 6.1, too, no program can empty a file of the user. Red with truncate
    left out of the filter: size 0, exit code 0."""
    asked = "version = LIBC.syscall(create, None, ctypes.c_size_t(0), 1)"
    source = sandbox.CHILD.read_text()
    assert asked in source
    child = tmp_path / "sandbox_child.py"
    child.write_text(source.replace(asked, f"version = {level}"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    data = tmp_path / "data.jsonl"
    data.write_text("a row")
    run = run_python(how.format(path=str(data)), limits=LIMITS)
    assert data.read_text() == "a row"
    assert run.exit_code == 1 and "Error" in run.stderr.strip().splitlines()[-1]


def test_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: keys in the trainer's environment stay there, in /proc too. Red with env=None."""
    monkeypatch.setenv("HF_TOKEN", "a secret")
    theirs = "open(f'/proc/{os.getppid()}/environ', 'rb').read()"
    run = run_python(
        f"import os; print('HF_TOKEN' in os.environ); print(b'HF_TOKEN' in {theirs})", limits=LIMITS
    )
    assert run.stdout == "False\n" and (LANDLOCK is False or "Permission denied" in run.stderr)


def test_the_time_limit_kills() -> None:
    """Goal: a program that never ends does, and says so, waiting or working. Hung without the kill."""
    run = run_python(
        "print('begun', flush=True)\nimport time; time.sleep(1e6)",
        limits=SandboxLimits(timeout_s=4.0),
    )
    assert run.timed_out and run.exit_code is None and run.stdout == "begun\n"


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.makedirs('a/b'); open('a/b/c', 'w').write('x')",
        "import os\nfor _ in range(1100): os.mkdir('d'); os.chdir('d')",
        "import os; os.makedirs('a/b'); os.mkdir('a/shut', 0); os.umask(0o777); os.mkdir('a/b/shut')",
    ],
    ids=["a file", "deep", "without rights"],
)
def test_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """Goal: the directory is gone afterwards, with what the program made in it, however that was meant.

    Red with mkdtemp, which keeps it; the deep one with shutil.rmtree, whose RecursionError ended the run.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_python(program, limits=LIMITS).exit_code == 0
    assert os.listdir(tmp_path) == []


def test_a_program_cannot_pass_for_a_refusal() -> None:
    """Goal: no program can end the run. Red when an exit code and a word on stderr told a refusal from a program."""
    run = run_python(
        "import sys; print('sandbox: no', file=sys.stderr); sys.exit(97)", limits=LIMITS
    )
    assert (run.exit_code, run.stderr) == (97, "sandbox: no\n")


def test_a_refusal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: where a right cannot be taken away nothing is run, and it is told why. Red without the check: exit code 1
    was a program that had failed."""
    child = tmp_path / "sandbox_child.py"
    child.write_text(sandbox.CHILD.read_text().replace("platform.machine()", "'vax'"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(SandboxError, match=r"on vax: needs Linux on one of x86_64, aarch64"):
        run_python("open('ran', 'w')", limits=LIMITS)


def test_the_users_own_limits_may_be_lower() -> None:
    """Goal: under a hard limit below ours (a cluster's ulimit) programs run. Red with ours set over it: ValueError,
    which counted as a program that failed."""
    program = (
        "from rollouts.training.rewards.sandbox import run_python; print(run_python('print(7)'))"
    )
    command = ["sh", "-c", 'ulimit -f 2048; exec "$0" -c "$1"', sys.executable, program]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Execution(exit_code=0, stdout='7\\n', stderr='')" in told


def sample(response: str, tests: Any) -> Sample:
    return Sample(prompt={"messages": [], "tests": tests}, response=response)


REVERSE = "Like this:\n```python\nprint(input()[::-1])\n```\nDone."
SQUARE = "```py\ndef square(x):\n    return x * x\n```"


@pytest.mark.parametrize(
    ("response", "tests", "share"),
    [
        (REVERSE, [{"stdin": "ab", "stdout": "ba\n"}, {"stdin": "xy \n", "stdout": " yx"}], 1.0),
        (
            REVERSE,
            json.dumps([{"stdin": "ab", "stdout": "ab"}, {"stdin": "xyx", "stdout": "xyx"}]),
            0.5,
        ),
        (SQUARE, [{"code": "assert square(3) == 9"}, {"code": "assert square(2) == 5"}], 0.5),
        ("```\nprint(1)\n```\nno:\n```\nprint(2)\n```", [{"stdin": "", "stdout": "2"}], 1.0),
        ("print(2)", [{"stdin": "", "stdout": "2"}], 1.0),
        # exits before the test
        ("```python\nraise SystemExit(0)\n```", [{"code": "assert False"}], 0.0),
        ("no program at all", [{"code": "pass"}], 0.0),
    ],
)
def test_code_rewards(response: str, tests: Any, share: float) -> None:
    """Goal: the share of tests passed, or all of them. Red with the first block, and without the proof printed last."""
    assert rewards.code_tests(sample(response, tests)) == share
    assert rewards.code_tests_all(sample(response, tests)) == float(share == 1.0)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "has no 'tests'"),
        ([], "needs a list"),
        ("[", "not JSON"),
        ([{"stdin": "a"}], "needs a list"),
    ],
)
def test_a_row_without_tests_is_an_error(tests: Any, message: str) -> None:
    """Goal: never a silent 0 that would train on nothing. Red without the check of their shape."""
    with pytest.raises(rewards.RewardError, match=message):
        rewards.code_tests(sample("x", tests))
