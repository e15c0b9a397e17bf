"""The verbs that keep order among runs: which there are, and what becomes of them once they have ended."""

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rollouts.remote import completion
from rollouts.remote.app import Json, Remote, Run, verb
from rollouts.view.screen import Screen


@verb("ls")
def ls(
    remote: Remote = None,
    *,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="As failed,died.",
            autocompletion=completion.states,
        ),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Or a pattern: 'sft_*'.",
            autocompletion=completion.experiments,
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="TAG", help="Or a pattern: 'paper-*'.", autocompletion=completion.tag_names
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="2d", help="Begun since 30m, 12h, 2d, 1w or 2026-11-01.")
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="started, run, experiment, state, target, stage or step.",
            autocompletion=completion.sorts,
        ),
    ] = "started",
    as_json: Json = False,
) -> Any:
    """List the runs started here, or with --remote those of a host."""
    from rollouts.remote import list_runs

    wanted = list_runs.read_wanted(
        states=state or (), experiment=experiment, since=since, sort=sort, now=time.time(), tag=tag
    )
    return list_runs.list_runs(remote=remote, wanted=wanted)


@verb("tag")
def tag(
    run: Run,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its other name.")],
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Take the tag away.")] = False,
    as_json: Json = False,
) -> Any:
    """Give a run a name of your own, which means it wherever a run is asked for."""
    from rollouts.remote import list_runs

    return list_runs.tag(run, name, remove=remove)


@verb("sweep")
def sweep(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A sweep, one of its runs, or `last`.",
            autocompletion=completion.run_names,
        ),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow its runs to their end first.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Print the table of a sweep that was started here."""
    from rollouts.remote import sweep_again

    return sweep_again.show_sweep(name, Screen(as_json=as_json), until_end=follow)


@verb("rm")
def rm(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Runs that are over.", autocompletion=completion.run_names
        ),
    ],
    remote: Remote = None,
    *,
    keep_results: Annotated[
        bool, typer.Option("--keep-results", help="Leave the results that lie here.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the only copies of results too.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Remove runs: their directories on the host, their results here, and the record of them."""
    from rollouts.remote import remove

    return remove.remove_runs(
        runs,
        remote=remote,
        keep_results=keep_results,
        yes=yes,
        confirm=None if as_json else _confirm(),
    )


@verb("gc")
def gc(
    remote: Remote = None,
    *,
    older_than: Annotated[
        str, typer.Option(metavar="14d", help="Not used since: 12h, 2d, 2w or a date.")
    ] = "14d",
    yes: Annotated[bool, typer.Option("--yes", help="Remove without a question.")] = False,
    as_json: Json = False,
) -> Any:
    """List what takes room on a host and was not used lately, and remove it; here, rented machines too."""
    from rollouts.remote import collect_host, collect_machines

    confirm = None if as_json else _confirm()
    answer = collect_host.collect(remote, older_than=older_than, yes=yes, confirm=confirm)
    return answer if remote is not None else collect_machines.with_machines(answer, confirm)


def _confirm() -> Callable[[str], bool] | None:
    """Return a question to the user; None where nobody sits at a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return lambda text: typer.confirm(text, err=True)


@verb("stop")
def stop(
    run: Run,
    remote: Remote = None,
    *,
    as_json: Json = False,
    now: Annotated[
        bool, typer.Option("--now", help="Without the checkpoint of the step under way.")
    ] = False,
) -> Any:
    """End a run's processes, after a checkpoint where steps are trained; its results stay."""
    from rollouts.remote import commands

    return commands.stop(run, remote=remote, now=now)


@verb("forget")
def forget(run: Run, as_json: Json = False) -> Any:
    """Drop this machine's record of a run; its host and the results here stay as they are."""
    from rollouts.remote import commands

    return commands.forget(run)
