"""`deploy gc`: what takes room on a host and was not used lately; removed once that is agreed.

The host decides what may go (worker/collect.py), and is told which checkpoints lie here too: no other one goes.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts, gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.read_answer import checked, read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.list_runs import read_moment
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.remove import Confirm
from rollouts.remote.run import registry
from rollouts.remote.texts import size_text
from rollouts.run_dir.results import copies_in
from rollouts.view.answer import Answer
from rollouts.view.escape import one_line
from rollouts.view.tables import columns

PROGRAM = "rollouts.worker.collect"
TIMEOUT_S = 3600.0
ANSWER = {"items": list[dict[str, Any]], "bytes": int, "removed": list[str], "problems": list[str]}
ITEM = {"kind": str, "path": str, "run_id": str, "bytes": int, "idle_s": float, "keep": str}
DAY_S = 86_400.0
SEVERAL = {
    "code": "copies of code",
    "weights": "copies of weights",
    "removed": "removed directories",
}  # others take an s


def collect(remote: str | None, *, older_than: str, yes: bool, confirm: Confirm | None) -> Answer:
    """List what may go on a host, and with a yes remove it (`deploy gc`). Raises DeployError."""
    with as_deploy_errors():
        now = time.time()
        older_than_s = now - read_moment(older_than, now=now, option="--older-than")
        if older_than_s < 0:
            raise DeployError(
                f"--older-than {older_than!r} lies ahead.",
                needed="a time that has passed, such as 14d",
            )
        with contextlib.closing(open_transport(remote)) as transport:
            facts = gather_facts(transport)
            question = {
                "home": facts.home,
                "older_than_s": older_than_s,
                "have": _have(facts),
                "remove": None,
            }
            answer = _ask(transport, facts, question)
            free = [item["path"] for item in answer["items"] if not item["keep"]]
            listed = _text(answer, transport.target, facts.home, older_than)
            if free and not yes and confirm is not None:
                yes = confirm(f"{listed}\nRemove {size_text(answer['bytes'])}?")
                listed = ""
            if not free or not yes:
                more = "\n`deploy gc … --yes` removes it" if free and confirm is None else ""
                return Answer(
                    {"target": transport.target, **answer},
                    f"{listed}{more}" or "nothing was removed",
                )
            # the copies as they are now: the answer may have taken its time
            done = _ask(transport, facts, question | {"have": _have(facts), "remove": free})
        size, where = size_text(done["bytes"]), _named(transport.target)
        text = f"removed {len(done['removed'])} of {len(free)}: {size} on {where}"
        notes = tuple(f"note: {problem}" for problem in done["problems"])
        return Answer(
            {"target": transport.target, **done}, f"{listed}\n{text}".strip(), remarks=notes
        )


def _have(facts: HostFacts) -> dict[str, dict[str, str]]:
    """Return the checkpoints that lie here whole, of the host's runs."""
    there = {row["run_id"] for row in facts.runs}
    entries = [entry for entry in registry.entries() if entry.run_id in there]
    return {
        entry.run_id: {
            name: mark
            for name, mark in copies_in(entry.mirror).items()
            if name.startswith("checkpoints/")
        }
        for entry in entries
    }


def _ask(transport: Transport, facts: HostFacts, question: dict[str, Any]) -> dict[str, Any]:
    if facts.python is None:
        raise DeployError(
            f"{transport.target} has no Python 3.10 or newer.", found=", ".join(facts.pythons_seen)
        )
    argv, program = sent_program(facts.python, PROGRAM)
    done = transport.run(argv, stdin=program + json.dumps(question).encode(), timeout_s=TIMEOUT_S)
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: what takes room there could not be found out.",
            found=done.err[-1000:],
        )
    answer = read_answer(transport.target, "what takes room there", done.out, ANSWER)
    return answer | {"items": [checked(item, ITEM) for item in answer["items"]]}


def _text(answer: dict[str, Any], target: str, home: str, older_than: str) -> str:
    """Return what may go, what stays and why, and the sum."""
    free = [item for item in answer["items"] if not item["keep"]]
    kept = [item for item in answer["items"] if item["keep"]]
    where = _named(target)
    lines = [_table(free, home)] if free else []
    lines.append(
        f"{size_text(answer['bytes'])} on {where} may go: {len(free)} not used for {older_than}, or left over"
        if free
        else f"nothing on {where} may go: nothing was unused for {older_than}, or left over"
    )
    reasons: dict[tuple[str, str], list[int]] = {}
    for item in kept:
        key = one_line(item["kind"]), one_line(item["keep"])
        reasons.setdefault(key, []).append(item["bytes"])
    lines += [
        f"stays: {_counted(len(sizes), kind)}: {why} ({size_text(sum(sizes))})"
        for (kind, why), sizes in sorted(reasons.items())
    ]
    return "\n".join(lines)


def _named(target: str) -> str:
    return "this machine" if target == LOCAL_TARGET else target


def _counted(count: int, kind: str) -> str:
    return f"{count} {kind if count == 1 else SEVERAL.get(kind, f'{kind}s')}"


def _table(items: Sequence[dict[str, Any]], home: str) -> str:
    rows = [["what", "size", "unused", "where"]]
    for item in sorted(items, key=lambda item: -item["bytes"]):
        days = f"{item['idle_s'] / DAY_S:.0f} d"
        rows.append(
            [
                one_line(item["kind"]),
                size_text(item["bytes"]),
                days,
                one_line(item["path"]).removeprefix(home + "/"),
            ]
        )
    return columns(rows)
