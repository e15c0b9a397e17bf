"""The command's frame: one application, what options mean wherever they occur, and how a verb's function becomes one.

The verbs are in deploy.py and the *_verbs.py beside this file. Nothing slow is imported until one of them needs it.
"""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rollouts.remote import completion
from rollouts.remote.command_line import ConfigOrVerb
from rollouts.remote.help_page import PAGE
from rollouts.view.screen import Screen

INTERRUPTED = 130
Function = Callable[..., Any]

app = typer.Typer(
    cls=ConfigOrVerb,
    help=PAGE,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118},
    subcommand_metavar="CONFIG | VERB RUN [OPTIONS]",
)

Remote = Annotated[
    str | None,
    typer.Option(
        metavar="[USER@]HOST[:PORT]",
        help="The host; this machine without it.",
        autocompletion=completion.targets,
    ),
]
Remotes = Annotated[
    list[str] | None,
    typer.Option(
        "--remote",
        metavar="[USER@]HOST[:PORT]",
        help="The host; this machine without it.",
        autocompletion=completion.targets,
    ),
]
Hosts = Annotated[
    pathlib.Path | None, typer.Option(metavar="FILE", help="TARGET [ADDRESS] a line.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
AcceptKey = Annotated[
    bool, typer.Option(help="Add the host's key to ~/.ssh/known_hosts if none is known.")
]
BusyOk = Annotated[bool, typer.Option("--busy-ok", help="Start on GPUs that others use too.")]
Wait = Annotated[
    bool, typer.Option("--wait", help="Queue on the host until its GPUs and ports are free.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Another value for a field; V1,V2: a sweep.",
        autocompletion=completion.settings,
    ),
]
NoCheckpoints = Annotated[
    bool, typer.Option("--no-checkpoints", help="Leave the checkpoints on the host.")
]
Only = Annotated[
    str | None,
    typer.Option(
        metavar="latest",
        help="The last checkpoint of each stage.",
        autocompletion=lambda: ["latest"],
    ),
]
Bwlimit = Annotated[
    str | None, typer.Option(metavar="RATE", help="At most that much a second, as 500K or 2.5M.")
]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Print what would happen.")]
Show = Annotated[bool, typer.Option("--show", help="Print the whole config.")]
Detach = Annotated[bool, typer.Option("--detach", help="Launch and return.")]
RunId = Annotated[str | None, typer.Option(metavar="NAME", help="Name of run and tmux session.")]
Skip = Annotated[
    int, typer.Option(min=0, metavar="N", help="Leave out the first N runs of a sweep.")
]
Yes = Annotated[
    bool, typer.Option("--yes", help="Rent without asking; start a sweep of more than 20 runs.")
]
Queue = Annotated[
    bool, typer.Option("--queue", help="The same, on any GPUs; a sweep's runs all at once.")
]
Slurm = Annotated[
    pathlib.Path | None,
    typer.Option(metavar="FILE", help="As a job of the host's Slurm; FILE has lines of #SBATCH."),
]
Sky = Annotated[
    pathlib.Path | None,
    typer.Option(metavar="FILE", help="Write a task for SkyPilot; nothing is started."),
]
AtOnce = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Of queued runs without GPUs.")
]
ConfigFile = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A file that builds `config = Config(...)`.",
        autocompletion=completion.config_files,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's name, as `deploy ls` shows it.",
        autocompletion=completion.run_names,
    ),
]


def verb(
    name: str, *, hidden: bool = False, launches: bool = False, takes_command: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a verb: what it returns is printed, and the command ends with its exit code; so with an error.

    The function returns an Answer or, having printed it, an exit code, and imports what it needs of rollouts.remote.
    `launches`: it is to start a run, so that an error says whether it did. `takes_command`: options that it does not
    have are words of a command of another program.
    """
    settings = {"ignore_unknown_options": takes_command}

    def register(function: Function) -> Function:
        @app.command(name, hidden=hidden, context_settings=settings)
        @functools.wraps(function)
        def command(**options: Any) -> None:
            to_launch = launches and not options.get("show")
            try:
                code = exit_code(function, options, to_launch=to_launch)
                sys.stdout.flush()
            except BrokenPipeError:  # `deploy logs RUN | head`: its reader has enough
                _drop_output()
                code = 0
            except KeyboardInterrupt:  # while modules are imported
                sys.stderr.write(
                    "interrupted." + (" Nothing was started.\n" if to_launch else "\n")
                )
                code = INTERRUPTED
            raise typer.Exit(code)

        return function

    return register


def exit_code(function: Function, options: dict[str, Any], *, to_launch: bool) -> int:
    """Run a verb and print its answer, or its error."""
    from rollouts.remote.errors import DeployError
    from rollouts.remote.local_faults import as_deploy_errors
    from rollouts.view.escape import tolerate_odd_text
    from rollouts.view.unread import output_may_close

    tolerate_odd_text()
    screen = Screen(as_json=options.get("as_json", False))
    # a launch goes on without a reader, and what is said of it goes to stderr
    with output_may_close(lambda: None) if to_launch else contextlib.nullcontext():
        try:
            with as_deploy_errors():
                answer = function(**options)
                return answer if isinstance(answer, int) else screen.show(answer)
        except DeployError as problem:
            from rollouts.remote.rented_host import instead_of

            error = instead_of(problem)
            screen.error(error.to_json(), error.text(launching=to_launch))
            return error.exit_code


def _drop_output() -> None:
    """Let what is still to be printed go nowhere: the interpreter flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
