"""Find a run by its name, and what is known of it: here, on its host, both, or neither.

A run that is not on its host may be one that is yet to come: what lies here tells "never launched" from "gone".
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts, gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.local_faults import RunProgress, as_deploy_errors
from rollouts.remote.run import registry
from rollouts.remote.run.adopt import adopt_run
from rollouts.remote.run.connection import RetryPolicy, RunConnection, WhyGone
from rollouts.remote.run.last_seen import note_died, note_seen, was_launched
from rollouts.remote.run.pull import Pulled, pull
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.run_names import find_known, find_on_host
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.remote.run.watch import RunResult, watch
from rollouts.run_dir import FINAL_STATES
from rollouts.view.reporter import Reporter, Say

Trace = Literal["on its host", "being launched", "unreadable", "gone", "never launched"]


@dataclass(frozen=True)
class OpenRun:
    """A run, its host as it is now, and what was found there."""

    entry: RunEntry
    facts: HostFacts
    transport: Transport
    row: dict[str, Any] | None  # host_probe.run_row
    trace: Trace
    progress: RunProgress
    wanted: ToBring = EVERYTHING

    @property
    def python(self) -> str:
        """Return the host's interpreter. Raises DeployError where it has none any more."""
        if self.facts.python is None:
            raise DeployError(
                "the host has no Python 3.10 or newer any more.",
                found=", ".join(self.facts.pythons_seen),
                started=True,
            )
        return self.facts.python

    @property
    def connection(self) -> RunConnection:
        return RunConnection(self.entry, self.python, self.transport, self.wanted)

    def watch(self, reporter: Reporter, why_gone: WhyGone) -> RunResult:
        """Follow it to its end. Raises DeployError, or KeyboardInterrupt to detach.

        `why_gone` says why its host will not answer again: then HostGoneError is raised.
        """
        result = watch(self.connection, reporter, RetryPolicy.while_it_lasts(why_gone))
        if result.state == "died":
            note_died(self.entry)
        return result

    def pull(self, say: Say) -> Pulled:
        """Bring everything here that there is now, verified. Raises DeployError."""
        return pull(self.connection, say)

    def missing(self) -> DeployError:
        """Return the error for a run without files on its host."""
        entry = self.entry
        if self.trace == "gone":
            config = shlex.quote(f"{entry.local_dir}/config.json")
            again = f"to train again: deploy {config}"
            if entry.adopted:  # that config came from the host
                again = f"to train again: read {config}, and deploy a copy of it"
            return DeployError(
                f"{entry.run_id} was launched once, and its directory is gone from {entry.target}.",
                found=f"nothing at {entry.run_path}; what was pulled is in {entry.local_dir}",
                fix=f"{again} (--remote …); `deploy forget {entry.run_id}` drops the entry",
            )
        return DeployError(
            f"{entry.run_id} was never launched on {entry.target}.",
            found=entry.reason,
            fix=f"deploy attach {entry.run_id} launches it; `deploy forget {entry.run_id}` drops it",
        )


@contextlib.contextmanager
def open_run(
    name: str,
    remote: str | None,
    *,
    adopt: bool = True,
    needs_files: bool = False,
    accept_new_host_key: bool = False,
    wanted: ToBring = EVERYTHING,
) -> Iterator[OpenRun]:
    """Open a run by name, and its host: from the registry, or, started elsewhere, from the host that --remote names.

    `adopt`: register one that was started elsewhere. `needs_files`: raise DeployError for one without files there.
    """
    with as_deploy_errors() as progress:
        entry = registry.find(name) or (None if remote else find_known(name))
        target = remote or (entry.target if entry else LOCAL_TARGET)
        if entry is not None:
            progress.run_id, progress.target = entry.run_id, target
        with contextlib.closing(
            open_transport(target, accept_new_host_key=accept_new_host_key)
        ) as transport:
            asked = entry.run_id if entry else name
            facts = gather_facts(transport, run_id=asked)
            if entry is None:
                run_id = find_on_host(name, facts, target)
                entry = registry.find(run_id)
            run_id = entry.run_id if entry else run_id
            row = facts.run(run_id)
            if run_id != asked:  # the beginning of its name, a tag, or `last`
                facts = dataclasses.replace(facts, run_exists=row is not None)
            if entry is None or (entry.target != target and row is None):
                entry = adopt_run(run_id, target, facts, transport, keep=adopt)  # started elsewhere
            entry = dataclasses.replace(entry, target=target)  # one host may have several names
            _check_ours(entry, row)
            trace = _trace(entry, facts, transport, row)
            progress.run_id, progress.target = run_id, target
            if row is not None and trace == "on its host":
                progress.reached = "ended" if row["state"] in FINAL_STATES else "launched"
                if registry.is_known(run_id):
                    note_seen(entry, row)
            opened = OpenRun(entry, facts, transport, row, trace, progress, wanted)
            if needs_files and trace in ("gone", "never launched"):
                raise opened.missing()
            yield opened


def _check_ours(entry: RunEntry, row: dict[str, Any] | None) -> None:
    """Raise DeployError for another deploy's run of the same name: no verb here may act on it."""
    theirs = row.get("launch_id") if row else None
    if entry.adopted or not entry.launch_id or theirs in (None, entry.launch_id):
        return
    raise DeployError(
        f"the run {entry.run_id} on {entry.target} is not the one of this machine: another deploy had the name first.",
        found=f"{entry.run_path}, started by another deploy",
        fix=f"deploy forget {entry.run_id}; then deploy again with another --run-id, or `deploy attach {entry.run_id}"
        f" --remote {shlex.quote(entry.target)}` follows the other one",
    )


def _trace(
    entry: RunEntry, facts: HostFacts, transport: Transport, row: dict[str, Any] | None
) -> Trace:
    if row is not None:
        under_way = not row["launched"] and row["state"] not in FINAL_STATES
        return "being launched" if under_way and not entry.was_launched else "on its host"
    if facts.run_exists:
        listed = transport.run(["ls", "-a", entry.run_path], timeout_s=30)
        marks = {
            "status.json",
            "supervisor.lock",
            "events.jsonl",
            "metrics.jsonl",
            "exit",
            "checkpoints",
        }
        if listed.returncode != 0 or marks & set(listed.out.splitlines()):
            return "unreadable"
    return "gone" if was_launched(entry) else "never launched"
