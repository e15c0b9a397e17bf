"""Why a trainer ended, as its last lines tell. Pure, standard library only."""

import re
from collections.abc import Sequence

SENTENCE = "error: "  # what a mistake of the user's ends with: one line, and indented ones under it
_TRACEBACK = re.compile(
    r"^(?P<prefix>(?:\[rank\d+\]: )?[\s|+-]*)(?:Exception Group )?Traceback \(most recent call last\):$"
)
_TORCHRUN_ENDS = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
_TORCHRUN_SAYS = re.compile(r"^[EWI]\d{4} .*torch/distributed/(elastic|run)")


def without_torchrun(lines: Sequence[str]) -> list[str]:
    """The lines less torchrun's own traceback, which says no more than that a rank failed."""
    kept = list(lines)
    ends = [at for at, line in enumerate(kept) if line.startswith(_TORCHRUN_ENDS)]
    if ends:
        begins = [at for at in range(ends[-1]) if _TRACEBACK.match(kept[at])]
        kept = kept[: begins[-1] if begins else ends[-1]]
    return [line for line in kept if not _TORCHRUN_SAYS.match(line)]


def cause_of(lines: Sequence[str]) -> str | None:
    """The last `error:` sentence, else the exception of the last traceback; None where neither is there."""
    kept = without_torchrun(lines)
    for at in range(len(kept) - 1, -1, -1):
        if kept[at].startswith(SENTENCE):
            return "\n".join([kept[at].removeprefix(SENTENCE), *_indented(kept[at + 1 :])]).strip()
    for at in range(len(kept) - 1, -1, -1):
        if found := _TRACEBACK.match(kept[at]):
            return _exception(kept[at + 1 :], found["prefix"].replace("+", "|"))
    return None


def _indented(lines: Sequence[str]) -> list[str]:
    """Those of the beginning that are indented."""
    more = next((at for at, line in enumerate(lines) if not line.startswith("  ")), len(lines))
    return list(lines[:more])


def _exception(lines: Sequence[str], prefix: str) -> str | None:
    """The first line below a traceback's header that is not indented under it: `ValueError: …`.

    Several ranks write at once, each of its lines with its number: those of others are passed over.
    """
    for line in lines:
        text = line.removeprefix(prefix) if line.startswith(prefix) else ""
        if text and not text.startswith((" ", "\t")):
            return text.strip()
    return None
