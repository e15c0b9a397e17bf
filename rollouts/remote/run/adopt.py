"""Runs that were started on another machine: an entry here, so that they can be followed, stopped and pulled."""

import contextlib
import json
import math
import re
import time
from pathlib import Path

from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.transport import Transport
from rollouts.remote.repository import find_repository
from rollouts.remote.run import registry
from rollouts.remote.run.mirror_files import replace
from rollouts.remote.run.mirror_note import write_note
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.run_names import no_run
from rollouts.run_dir import EXPERIMENT_NAME_PATTERN, valid_run_id

ADOPTED_DIR = "runs"  # where their mirrors lie, under the working directory
CONFIG_BYTES_MAX = 1 << 20


def adopt_run(
    run_id: str, target: str, facts: HostFacts, transport: Transport, *, keep: bool
) -> RunEntry:
    """Return an entry for a run that another machine started; `keep`: register it, and make its mirror.

    Only its name and its experiment's come from the host, checked; where the mirror lies is decided here.
    """
    row = facts.run(run_id)
    if row is None:
        raise no_run(
            run_id,
            target,
            [*(e.run_id for e in registry.entries()), *(r["run_id"] for r in facts.runs)],
        )
    experiment = str(row["experiment_name"])
    if not valid_run_id(run_id) or not re.fullmatch(EXPERIMENT_NAME_PATTERN, experiment):
        raise DeployError(
            f"{target} names a run {run_id[:100]!r} of an experiment {experiment[:100]!r}.",
            needed="names of letters, digits, '-' and '_'",
            fix="a run that `deploy` started has such names; look at that host",
        )
    root = _here()
    started_at = row.get("started_at")
    entry = RunEntry(
        run_id=run_id,
        experiment_name=experiment,
        target=target,
        home=facts.home,
        run_path=f"{facts.home}/runs/{run_id}",
        local_dir=str(root / ADOPTED_DIR / experiment / run_id),
        repository=str(root),
        created_at=float(started_at)
        if isinstance(started_at, int | float) and math.isfinite(started_at)
        else 0.0,
        adopted=True,
    )
    if keep:
        # before anything of the host's is there
        write_note(entry, now=time.time(), followed_by=None)
        copy_descriptions(entry, transport)
        registry.save(entry)
    return entry


def _here() -> Path:
    try:
        return find_repository(Path.cwd())
    except DeployError:
        return Path.cwd()


def copy_descriptions(entry: RunEntry, transport: Transport) -> None:
    """Copy the host's config.json and plan.json, for people to read: nothing is launched from them."""
    for name in ("config.json", "plan.json"):
        file = f"{entry.run_path}/{name}"
        done = transport.run(["head", "-c", str(CONFIG_BYTES_MAX + 1), file], timeout_s=30)
        if done.returncode != 0 or len(done.stdout) > CONFIG_BYTES_MAX:
            continue
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(done.stdout)
            replace(entry.mirror.path, name, json.dumps(data, indent=1).encode() + b"\n")
