"""`deploy gc`'s part about rented machines: this machine's ledger brought to what the providers say.

A machine is ended only when somebody says so, one by one: it may be another computer's, or still be wanted.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from rollouts.remote.errors import DeployError
from rollouts.remote.machine_end import end_machine, is_live
from rollouts.view.answer import Answer

if TYPE_CHECKING:
    from rollouts.cloud.ledger import Lease
    from rollouts.cloud.our_machines import MachineRow, OurMachines

Confirm = Callable[[str], bool]


@dataclass
class Reconciled:
    """What was changed in the ledger, what bills, and what was ended; `remarks` are for stderr."""

    document: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    remarks: tuple[str, ...] = ()
    failed: bool = False


def with_machines(answer: Answer, confirm: Confirm | None) -> Answer:
    """Return the answer of `deploy gc` with what became of rented machines. Exit code 1: something is not known."""
    found = reconcile(confirm)
    document = {**cast(dict[str, Any], answer.document), "machines": found.document}
    return dataclasses.replace(
        answer,
        document=document,
        text="\n".join(filter(None, (answer.text, found.text))),
        exit_code=1 if found.failed else answer.exit_code,
        remarks=(*answer.remarks, *found.remarks),
    )


def reconcile(confirm: Confirm | None) -> Reconciled:
    """Ask the providers, close and reopen leases by what they say, and ask about machines without a live run.

    Where nothing was ever rented from here, nobody is asked.
    """
    from rollouts.cloud.ledger import Ledger

    ledger = Ledger()
    before = {lease.name: lease.step for lease in ledger.leases()}
    if not before:
        return Reconciled()
    from rollouts.remote.cloud_verbs import cloud_verb

    with cloud_verb():
        import anyio

        from rollouts.cloud.our_machines import look, machines_json

        found = anyio.run(look, ledger)
    after = {lease.name: lease for lease in ledger.leases()}
    changed = [
        f"{name}: {before[name]}, now {lease.step}"
        for name, lease in after.items()
        if name in before and lease.step != before[name]
    ]
    unused = [row for row in found.rows if not row.recorded or not _is_used(row, after)]
    ended, errors = _ask_about(unused, found, confirm)
    kept = [row for row in unused if row.name not in ended]
    lines = [f"ledger    {line}" for line in changed]
    lines += [f"ended     {name}" for name in ended]
    lines += [f"bills     {_about(row)}" for row in kept]
    if kept:
        lines.append("end one   deploy machines end MACHINE")
    errors += [f"error: {error.problems[0].text()}" for error in found.problems.values()]
    document = {"changed": changed, "ended": ended, **machines_json(found)}
    return Reconciled(document, "\n".join(lines), tuple(errors), failed=bool(errors))


def _is_used(row: "MachineRow", leases: "dict[str, Lease]") -> bool:
    run_id = leases[row.name].run_id if row.name in leases else None
    return run_id is not None and is_live(run_id)


def _ask_about(
    rows: "list[MachineRow]", found: "OurMachines", confirm: Confirm | None
) -> tuple[list[str], list[str]]:
    """End those that the user wants to end. Returns their names, and what went wrong."""
    ended, errors = [], []
    for row in rows:
        if row.machine_id is None or confirm is None or not confirm(f"{_about(row)}. End it?"):
            continue
        try:
            if not row.recorded:
                _adopt(row, found)
            end_machine(row.name, reason="deploy gc")
            ended.append(row.name)
        except DeployError as error:
            errors.append(error.text(launching=False))
    return ended, errors


def _adopt(row: "MachineRow", found: "OurMachines") -> None:
    from rollouts.cloud.ledger import Ledger

    (machine,) = [one for one in found.unknown if one.machine_id == row.machine_id]
    Ledger().adopt(machine, now=time.time())


def _about(row: "MachineRow") -> str:
    price = "an unknown price" if row.price_per_hour is None else f"${row.price_per_hour:.2f}/h"
    why = "its run is not live" if row.recorded else "not in the ledger here: another computer's?"
    return f"{row.name} ({row.provider}, {price}, {row.state}): {why}"
