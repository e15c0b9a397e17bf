"""Why a trainer ended: found among what torchrun, other ranks and shutdowns print after it."""

import sys
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import RunDir
from rollouts.worker.supervise.causes import cause_of, without_torchrun
from rollouts.worker.supervise.open_window import OpenWindow
from tests.worker.stands import Host, as_status, events, process, stage, trainer, wait_for_end

TORCHRUN = """\
E1129 01:02:03.123000 4711 torch/distributed/elastic/multiprocessing/api.py:988] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
rollouts.worker.trainer FAILED
"""


def killed(number: int) -> str:
    return TORCHRUN.replace("exitcode: 1)", f"exitcode: -{number})")


TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\n'
GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "x.py", line 1, in <module>
  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "x.py", line 2, in f
    | ValueError: the inner one
    +------------------------------------
"""
RANKS = """\
[rank1]: Traceback (most recent call last):
[rank0]: Traceback (most recent call last):
[rank1]:   File "x.py", line 1, in <module>
[rank0]:   File "x.py", line 1, in <module>
[rank1]: ValueError: of rank 1
[rank0]: ValueError: of rank 0
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f"step=1\nerror: row 3 has no 'answer'\n{TORCHRUN}", "row 3 has no 'answer'"),
        (
            f"error: two\n  found 1\n  needed 2\nW something\n{TORCHRUN}",
            "two\n  found 1\n  needed 2",
        ),
        (f"{TRACEBACK}KeyError: 'answer'\n{TORCHRUN}", "KeyError: 'answer'"),
        (
            f"{TRACEBACK}KeyError: 'a'\n\nDuring handling\n\n{TRACEBACK}ValueError: b\n{TORCHRUN}",
            "ValueError: b",
        ),
        (
            f"{TRACEBACK}ValueError: many\nlines\nwarning: leaked objects\n{TORCHRUN}",
            "ValueError: many",
        ),
        (f"{GROUP}{TORCHRUN}", "ValueError: the inner one"),
        (f"{RANKS}{TORCHRUN}", "ValueError: of rank 0"),
        (
            f"step=1\n{TORCHRUN}",
            "rank 0 ended with exit code 1 without a word: something called exit",
        ),
        ("Killed\n", None),
        (
            f"error: caught\n{TRACEBACK}KeyError: 'caught too'\n{killed(9)}",
            "rank 0 was ended by SIGKILL: the kernel does "
            "that when the host's memory runs out (`dmesg` shows it there)",
        ),
        (
            killed(7),
            "rank 0 was ended by SIGBUS: the host's shared memory may be full (`df /dev/shm` there)",
        ),
        (
            killed(11),
            "rank 0 was ended by SIGSEGV: a crash in compiled code, whose own words are in the log",
        ),
        (killed(63), "rank 0 was ended by signal 63"),
        (
            f"{killed(9).splitlines()[0]}\n{TORCHRUN}",
            "rank 0 was ended by SIGKILL: the kernel does "
            "that when the host's memory runs out (`dmesg` shows it there)",
        ),
    ],
)
def test_the_cause_is_found(text: str, cause: str | None) -> None:
    """Goal: the sentence or the exception of the trainer itself, never torchrun's; where a signal or an exit ended it,
    that, though the log holds older words. Red with the last traceback of all ("ChildFailedError"), and with what
    torchrun says of a rank's end left out (no cause at all)."""
    assert cause_of(text.splitlines()) == cause
    kept = "\n".join(without_torchrun(text.splitlines()))
    assert not any(word in kept for word in ("ChildFailedError", "FAILED", "torch/distributed"))


def real_torchrun(text: str) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--rdzv-backend",
            "c10d",
            "--rdzv-conf",
            "store_type=file",
        ),
        *("--nproc-per-node", "1", "--no-python", sys.executable, "-c", text),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; print('error: the data has no rows'); sys.exit(1)", "the data has no rows"),
        (
            "raise ValueError('of ours')",
            "stage sft: trainer ended with exit code 1: ValueError: of ours",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "stage sft: trainer ended with exit code 1: rank 0 was ended by SIGKILL: the kernel does that when the "
            "host's memory runs out (`dmesg` shows it there)",
        ),
    ],
    ids=["a sentence", "a traceback", "a signal"],
)
def test_the_cause_is_the_runs_message(host: Host, text: str, message: str) -> None:
    """Goal: under the real torchrun the trainer's own words are the run's message, everywhere that one is kept, and
    torchrun's traceback is not among the lines that are shown. Red before: "stage sft: trainer ended with exit code 1"
    and 50 lines of torchrun's."""
    run = host.finish(stage("sft", process("trainer", real_torchrun(text))))
    assert as_status(run)["message"] == message
    (error,), (ended,) = events(run, "error"), events(run, "run_ended")
    assert error["message"] == ended["message"] == message
    assert not any("ChildFailedError" in line for line in error["log_tail"])
    record = run_dir.read_exit(run, "run", "supervisor")
    assert record is not None and record.message == message
    own = run_dir.read_exit(run, "sft", "trainer")
    assert own is not None and own.message and own.message in message


def test_the_event_has_all_lines(host: Host) -> None:
    """Goal: an `error` event of the trainer's is the message, whole, though the log has other lines after it. Red with
    the log alone asked."""
    said = "import sys, os; sys.path.insert(0, os.getcwd())\nfrom pathlib import Path\nfrom rollouts import run_dir\n"
    tell = (
        "run_dir.append_event(run_dir.RunDir(Path(sys.argv[1])), 'error', message={!r},"
        " window='trainer', log_tail=[])"
    )
    text = "\n".join(
        [said, tell.format("two\nlines"), "print('error: two'); print('noise'); sys.exit(1)"]
    )
    job = host.job(stage("sft", trainer(text)))
    run = host.launched[-1]
    job["plan"]["stages"][0]["trainer"]["argv"].append(str(run.path))
    assert host.launch(job).returncode == 0
    wait_for_end(run)
    assert as_status(run)["message"] == "two\nlines"


def test_an_earlier_stages_cause_is_not_this_ones(tmp_path: Path) -> None:
    """Goal: an `error` event from before the stage is not why its trainer ended. Red with all events looked at."""
    run = RunDir(tmp_path)
    spec = process("trainer", [])
    window = OpenWindow(run, "rl", spec, may_end=True, wrapper=0, wrapper_ticks=None, log_start=0)
    run_dir.append_event(run, "error", message="of sft", window="trainer")
    assert window.cause() == ("of sft", True)
    run_dir.append_event(run, "stage_started", stage="rl")
    assert window.cause() == ("", False)
