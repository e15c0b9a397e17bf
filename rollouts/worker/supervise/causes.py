"""Why a trainer ended, as its last lines tell. Pure, standard library only."""

import re
import signal
from collections.abc import Sequence

SENTENCE = "error: "  # what a mistake of the user's ends with: one line, and indented ones under it
_TRACEBACK = re.compile(
    r"^(?P<prefix>(?:\[rank\d+\]: )?[\s|+-]*)(?:Exception Group )?Traceback \(most recent call last\):$"
)
_TORCHRUN_ENDS = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
_TORCHRUN_SAYS = re.compile(r"^[EWI]\d{4} .*torch/distributed/(elastic|run)")
_RANK_ENDED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_KILLED_BY = {
    signal.SIGKILL: "the kernel does that when the host's memory runs out (`dmesg` shows it there)",
    signal.SIGBUS: "the host's shared memory may be full (`df /dev/shm` there)",
}
_PASSES = re.compile(  # of an exception's text: CUDA's own faults, but for its memory, and collectives that broke
    r"CUDA error|cudaError|CUDNN_STATUS|CUBLAS_STATUS|NCCL|DistBackendError|DistNetworkError|DistStoreError"
    r"|gloo/|Connection (closed|reset) by peer|Connection was likely closed|uncorrectable ECC",
    re.IGNORECASE,
)
_CRASHED = "a crash in compiled code, whose own words are in the log"


def without_torchrun(lines: Sequence[str]) -> list[str]:
    """Return the lines less torchrun's own traceback, which says no more than that a rank failed."""
    kept = list(lines)
    ends = [at for at, line in enumerate(kept) if line.startswith(_TORCHRUN_ENDS)]
    if ends:
        begins = [at for at in range(ends[-1]) if _TRACEBACK.match(kept[at])]
        kept = kept[: begins[-1] if begins else ends[-1]]
    return [line for line in kept if not _TORCHRUN_SAYS.match(line)]


def cause_of(lines: Sequence[str]) -> str | None:
    """Return the signal that ended a rank, else the last `error:` sentence, else the exception of the last traceback.

    Else the exit code of a rank that ended without a word; None where none of these is there.
    """
    rank, code = _first_end(lines)
    if code < 0:
        return _killed(rank, -code)
    kept = without_torchrun(lines)
    for at in range(len(kept) - 1, -1, -1):
        if kept[at].startswith(SENTENCE):
            return "\n".join([kept[at].removeprefix(SENTENCE), *_indented(kept[at + 1 :])]).strip()
    for at in range(len(kept) - 1, -1, -1):
        if found := _TRACEBACK.match(kept[at]):
            return _exception(kept[at + 1 :], found["prefix"].replace("+", "|"))
    return (
        f"rank {rank} ended with exit code {code} without a word: something called exit"
        if code
        else None
    )


def may_pass(lines: Sequence[str]) -> bool:
    """Whether what ended a trainer with these last lines need not come again.

    A signal may pass, as the kernel's for want of memory does, and a fault of a device or of the way between ranks;
    a mistake of the user's, and any other exception, will come again.
    """
    if _first_end(lines)[1] < 0:
        return True
    kept = without_torchrun(lines)
    if any(line.startswith(SENTENCE) for line in kept):
        return False
    return _PASSES.search(cause_of(lines) or "") is not None


def _first_end(lines: Sequence[str]) -> tuple[int, int]:
    """Return the local rank that torchrun saw failing first, and its exit code, negative for a signal; (0, 0)
    for none."""
    ends = [
        found
        for line in lines
        if _TORCHRUN_SAYS.match(line) and (found := _RANK_ENDED.search(line))
    ]
    return (int(ends[0][2]), int(ends[0][1])) if ends else (0, 0)


def _killed(rank: int, number: int) -> str:
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"rank {rank} was ended by signal {number}"
    return f"rank {rank} was ended by {name.name}: {_KILLED_BY.get(name, _CRASHED)}"


def _indented(lines: Sequence[str]) -> list[str]:
    """Return those of the beginning that are indented."""
    more = next((at for at, line in enumerate(lines) if not line.startswith("  ")), len(lines))
    return list(lines[:more])


def _exception(lines: Sequence[str], prefix: str) -> str | None:
    """Return the first line below a traceback's header that is not indented under it: `ValueError: …`.

    Several ranks write at once, each of its lines with its number: those of others are passed over.
    """
    for line in lines:
        text = line.removeprefix(prefix) if line.startswith(prefix) else ""
        if text and not text.startswith((" ", "\t")):
            return text.strip()
    return None
