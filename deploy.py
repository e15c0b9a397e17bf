"""The command: `deploy CONFIG`, and what one does with a run afterwards. Parses, and hands over to rollouts.remote.

`deploy --help` is the documentation. Nothing slow is imported until a verb needs it.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

PAGE = """
Train a language model from one config file: SFT, then RL, here or on a GPU host over SSH.

\b
  deploy configs/00_cpu_sft_rl.py                          on this machine
  deploy configs/00_cpu_sft_rl.py --remote gpu-7           on a host of ~/.ssh/config
  deploy configs/00_cpu_sft_rl.py --remote ubuntu@203.0.113.7:22
  deploy configs/00_cpu_sft_rl.py --remote gpu-7 --plan    what would happen; touches nothing
  deploy runs/cpu_sft_rl/RUN/config.json                   what an earlier run did, again
  deploy --remote gpu-7                                    is this host ready, and what runs there?

The config is checked first, every problem at once. Then: exactly git's files, with your uncommitted changes, go to
the host; it makes a virtual environment (or reuses the same one); one tmux session runs the stages, with a window per
process; results come back while it runs. Ctrl-C detaches, the run goes on, and a killed deploy loses nothing:

\b
  deploy ls                             runs started here, as last seen
  deploy ls --remote gpu-7              all runs on that host
  deploy status RUN                     one look
  deploy attach RUN                     follow again, from where you left off
  deploy logs RUN -f --window trainer   what the tmux window shows (windows: supervisor, engine-0, trainer)
  deploy stop RUN                       end its processes, keep its results
  deploy pull RUN                       bring all results here, verified
  ssh HOST -t tmux attach -t RUN        the live processes

A run started on another machine is found with --remote: deploy attach RUN --remote gpu-7.

\b
Options of deploy CONFIG:
  --remote [USER@]HOST[:PORT]  the host, as `ssh` knows it (ssh://... too); this machine without it
  --plan                       print every step and every reason against it, and stop
  --json                       for programs: with --plan, ls, status, stop, pull, logs one JSON document;
                               while following, one object a line: {"type": "progress" | "event" | "metrics" |
                               "eval", ...}, last {"type": "result", ...} or {"type": "error", ...}
  --detach                     launch and return
  --run-id NAME                name of the run and its tmux session; default <experiment_name>-<date>-<time>-<random>
  --accept-new-host-key        add the host's key to ~/.ssh/known_hosts if none is known; a changed key never passes

\b
Files:
  <save_dir>/<experiment_name>/<run_id>/  here: config, metrics, rollouts, evaluations, logs, checkpoints
  ~/.rollouts/runs/<run_id>/              the same on the host ($ROLLOUTS_HOME in place of ~/.rollouts)
  ~/.rollouts/registry/                   here: the runs that this machine started
  docs/run-directory.md                   every file and its format

\b
Exit codes:
  0     the job is done (or what was asked is)
  2     it could not start, and nothing was started; the message says why, and what to do
  130   detached by Ctrl-C; the run goes on
  other the job's own exit code; 1 when it died, or when its results could not be pulled
"""

HOST_VERB, CONFIG_VERB = "check-host", "run-config"  # what a line without a verb means
OPTIONS_WITH_VALUE = ("--remote", "--run-id", "--window")


class ConfigOrVerb(TyperGroup):
    """The first word is a verb or a config file; options may stand before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_verb(args, self.commands))


def with_verb(args: list[str], verbs: Any) -> list[str]:
    """`args` with the verb first: `x.py --plan` → `run-config x.py --plan`, `--remote h ls` → `ls --remote h`."""
    position = _first_word(args)
    if position is None:
        asks_host = any(arg == "--remote" or arg.startswith("--remote=") for arg in args) and "--help" not in args
        return [HOST_VERB, *args] if asks_host else (args or ["--help"])
    word = args[position]
    if word in verbs:
        return [word, *args[:position], *args[position + 1 :]]
    return [CONFIG_VERB, *args]


def _first_word(args: list[str]) -> int | None:
    skip = False
    for index, arg in enumerate(args):
        if skip:
            skip = False
        elif arg in OPTIONS_WITH_VALUE:
            skip = True
        elif arg == "--":
            return index + 1 if index + 1 < len(args) else None
        elif not arg.startswith("-"):
            return index
    return None


app = typer.Typer(
    cls=ConfigOrVerb,
    help=PAGE,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118, "terminal_width": 118},
    subcommand_metavar="CONFIG | VERB RUN [OPTIONS]",
)

Remote = Annotated[str | None, typer.Option(metavar="[USER@]HOST[:PORT]", help="The host; this machine without it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
AcceptKey = Annotated[bool, typer.Option(help="Add the host's key to ~/.ssh/known_hosts if none is known.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, as `deploy ls` shows it.")]


def _do(verb: Callable[[Any], int], *, as_json: bool) -> None:
    """Run one verb of rollouts.remote.commands, and exit with its code."""
    from rollouts.remote import commands
    from rollouts.remote.errors import DeployError

    try:
        code = verb(commands)
    except DeployError as error:
        code = commands.fail(error, as_json=as_json)
    except KeyboardInterrupt:
        code = commands.DETACHED
    except BrokenPipeError:  # `deploy logs RUN | head`
        sys.stderr.close()
        code = 1
    raise typer.Exit(code)


@app.command(CONFIG_VERB, hidden=True)
def run_config(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A file that builds `config = Config(...)`.")],
    *,
    remote: Remote = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would happen, and touch nothing.")] = False,
    as_json: Json = False,
    detach: Annotated[bool, typer.Option("--detach", help="Launch and return.")] = False,
    run_id: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run and its tmux session.")] = None,
    accept_new_host_key: AcceptKey = False,
) -> None:
    """Run the job that CONFIG describes, and follow it."""
    _do(
        lambda commands: commands.deploy(
            config,
            remote=remote,
            plan_only=plan,
            as_json=as_json,
            detach=detach,
            run_id=run_id,
            accept_new_host_key=accept_new_host_key,
        ),
        as_json=as_json,
    )


@app.command(HOST_VERB, hidden=True)
def check_host(remote: Remote = None, as_json: Json = False, accept_new_host_key: AcceptKey = False) -> None:
    """Check a host, and list the runs on it."""
    _do(
        lambda commands: commands.check_host(remote, as_json=as_json, accept_new_host_key=accept_new_host_key),
        as_json=as_json,
    )


@app.command("ls")
def ls(remote: Remote = None, as_json: Json = False) -> None:
    """List the runs started here, or with --remote those of a host."""
    _do(lambda commands: commands.list_runs(remote=remote, as_json=as_json), as_json=as_json)


@app.command("status")
def status(run: Run, remote: Remote = None, as_json: Json = False) -> None:
    """Ask the host where a run is."""
    _do(lambda commands: commands.status(run, remote=remote, as_json=as_json), as_json=as_json)


@app.command("attach")
def attach(run: Run, remote: Remote = None, as_json: Json = False, accept_new_host_key: AcceptKey = False) -> None:
    """Follow a run to its end; go on with a deploy that was interrupted."""
    _do(
        lambda commands: commands.attach(run, remote=remote, as_json=as_json, accept_new_host_key=accept_new_host_key),
        as_json=as_json,
    )


@app.command("logs")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    window: Annotated[str, typer.Option(metavar="NAME", help="supervisor, engine-0 or trainer.")] = "trainer",
    remote: Remote = None,
    as_json: Json = False,
) -> None:
    """Print what a window of the run's tmux session shows."""
    _do(
        lambda commands: commands.logs(run, remote=remote, window=window, follow_on=follow, as_json=as_json),
        as_json=as_json,
    )


@app.command("stop")
def stop(run: Run, remote: Remote = None, as_json: Json = False) -> None:
    """End a run's processes; its results stay."""
    _do(lambda commands: commands.stop(run, remote=remote, as_json=as_json), as_json=as_json)


@app.command("pull")
def pull(run: Run, remote: Remote = None, as_json: Json = False) -> None:
    """Bring all results of a run here, verified."""
    _do(lambda commands: commands.pull_run(run, remote=remote, as_json=as_json), as_json=as_json)


def main() -> None:
    """The console script's entry point."""
    app(prog_name="deploy")


if __name__ == "__main__":
    main()
