"""The verbs that reach into a run's directory on its host: ssh, cp."""

from typing import Annotated, Any

import typer

from rollouts.remote import completion
from rollouts.remote.app import Json, Remote, Run, verb
from rollouts.view.screen import Screen


@verb("ssh", takes_command=True)
def ssh(
    run: Run,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="In place of a shell; one word: a line of sh."),
    ] = None,
    *,
    remote: Remote = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Of several; as RUN@HOST says.")
    ] = None,
) -> Any:
    """Open a shell in the run's directory on its host; or run a command there, and end with its exit code."""
    from rollouts.remote import shell

    return shell.run_shell(run, command or (), remote=remote, host=host)


@verb("cp")
def cp(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN:PATH... [DEST]",
            help="Files or folders of runs; a place here.",
            autocompletion=completion.run_files,
        ),
    ],
    *,
    remote: Remote = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Write over files that differ.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Copy files of a run here; without DEST, list them."""
    from rollouts.remote import copy_verb

    return copy_verb.copy(paths, Screen(as_json=as_json), remote=remote, force=force)
