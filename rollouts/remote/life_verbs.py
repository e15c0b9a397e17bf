"""The verbs that keep order among runs: which there are, and what becomes of them once they have ended."""

import time
from typing import Annotated, Any

import typer

from rollouts.remote.app import Json, Remote, verb


@verb("ls")
def ls(
    remote: Remote = None,
    *,
    state: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Such as running, or failed,died.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(metavar="NAME", help="Or a pattern: 'sft_*'.")] = None,
    since: Annotated[str | None, typer.Option(metavar="2d", help="Begun since 30m, 12h, 2d, 1w or 2026-11-01.")] = None,
    sort: Annotated[
        str, typer.Option(metavar="KEY", help="started, run, experiment, state, target, stage or step.")
    ] = "started",
    as_json: Json = False,
) -> Any:
    """List the runs started here, or with --remote those of a host."""
    from rollouts.remote import list_runs

    wanted = list_runs.read_wanted(states=state or (), experiment=experiment, since=since, sort=sort, now=time.time())
    return list_runs.list_runs(remote=remote, wanted=wanted)
