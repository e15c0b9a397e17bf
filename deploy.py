"""The command: `deploy CONFIG`, and what one does with a run afterwards. Parses, and hands over to rollouts.remote.

`deploy --help` is the documentation. Nothing slow is imported until a verb needs it.
"""

import signal
import sys

# not where a test imports this
if sys.argv[0].rpartition("/")[2] in ("deploy", "deploy.py", "rollouts"):
    # until `main`: interrupted while it is read, it just ends
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import pathlib
from types import FrameType
from typing import Annotated, Any

import typer

from rollouts.remote import (  # noqa: F401  they add their verbs
    completion,
    config_file_verbs,
    file_verbs,
    life_verbs,
    look_verbs,
    machine_verbs,
)
from rollouts.remote.app import (
    AcceptKey,
    AtOnce,
    BusyOk,
    Bwlimit,
    ConfigFile,
    Detach,
    Hosts,
    Json,
    NoCheckpoints,
    Only,
    PlanOnly,
    Queue,
    Remote,
    Remotes,
    Run,
    RunId,
    Settings,
    Show,
    Skip,
    Sky,
    Slurm,
    Wait,
    Yes,
    app,
    verb,
)
from rollouts.remote.command_line import CONFIG_VERB, HOST_VERB
from rollouts.view.screen import Screen


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version of this program, and its commit.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"rollouts {version_text()}")
        raise typer.Exit(0)


def version_text() -> str:
    """Return the version in pyproject.toml (else of the installed package), and the commit of a clone."""
    import importlib.metadata
    import subprocess
    import tomllib

    root = pathlib.Path(__file__).resolve().parent
    try:
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
        version = str(tomllib.loads(text)["project"]["version"])
    except (OSError, ValueError, KeyError):
        # installed: git would tell of a repository that the environment lies in
        return importlib.metadata.version("rollouts")
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        return f"{version} ({commit})" if commit else version
    return version


@verb(CONFIG_VERB, hidden=True, launches=True)
def run_config(
    config: ConfigFile,
    *,
    remote: Remotes = None,
    hosts: Hosts = None,
    plan: PlanOnly = False,
    show: Show = False,
    as_json: Json = False,
    detach: Detach = False,
    run_id: RunId = None,
    accept_new_host_key: AcceptKey = False,
    busy_ok: BusyOk = False,
    settings: Settings = None,
    skip: Skip = 0,
    yes: Yes = False,
    no_checkpoints: NoCheckpoints = False,
    only: Only = None,
    bwlimit: Bwlimit = None,
    wait: Wait = False,
    queue: Queue = False,
    at_once: AtOnce = None,
    slurm: Slurm = None,
    sky: Sky = None,
) -> Any:
    """Run the job that CONFIG describes, and follow it."""
    from rollouts.remote import queue_options, read_config, rented, several_hosts, sky_task, sweep
    from rollouts.remote.host.named_hosts import host_words, named_hosts
    from rollouts.remote.run.wanted import ToBring

    wanted = ToBring.parse(no_checkpoints=no_checkpoints, only=only, bwlimit=bwlimit)
    if not (several := sweep.asks_for_several(settings or ())):
        sweep.check_alone(skip=skip, yes=yes and show)
    if show:
        return read_config.show_config(config, settings or ())
    if sky is not None:
        alone = not (remote or hosts or slurm or wait or queue or busy_ok or plan or detach)
        return sky_task.write_task(config, sky, settings or (), run_id, alone=alone)
    wish = queue_options.queue_wish(wait=wait, queue=queue, at_once=at_once, busy_ok=busy_ok)
    named = named_hosts(remote or (), hosts)
    by_slurm = queue_options.slurm_wish(
        slurm, wish, busy_ok=busy_ok, hosts=len(named), sweeps=several
    )
    screen, key = Screen(as_json=as_json), accept_new_host_key
    more: dict[str, Any] = {"busy_ok": busy_ok, "detach": detach, "wanted": wanted}
    if several:
        options = sweep.SweepOptions(
            hosts=named,
            hosts_words=host_words(remote or (), hosts),
            skip=skip,
            yes=yes,
            accept_new_host_key=accept_new_host_key,
            queue=wish,
            all_at_once=queue,
            **more,
        )
        sweep.check_options(options, run_id)
        return sweep.sweep(config, screen, settings or (), options, plan_only=plan)
    if len(named) > 1:
        start = several_hosts.StartOptions(run_id, plan, detach, key, busy_ok, wanted, wish)
        return several_hosts.deploy_on_several(config, screen, named, settings or (), start)
    target = named[0].target if named else None
    chosen = rented.RentOptions(
        plan_only=plan,
        run_id=run_id,
        yes=yes,
        queue=by_slurm or wish,
        **more,
    )
    place: dict[str, Any] = {"remote": target, "accept_new_host_key": key}
    return rented.deploy(config, screen, settings or (), chosen, **place)


@verb(HOST_VERB, hidden=True)
def check_host(
    remote: Remote = None, as_json: Json = False, accept_new_host_key: AcceptKey = False
) -> Any:
    """Check a host, and list the runs on it."""
    from rollouts.remote import looks

    return looks.check_host(remote, accept_new_host_key=accept_new_host_key)


@verb("doctor")
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="A config that is to run there.",
            autocompletion=completion.config_files,
        ),
    ] = None,
    *,
    remote: Remote = None,
    settings: Settings = None,
    as_json: Json = False,
    accept_new_host_key: AcceptKey = False,
) -> Any:
    """Examine a host before a run: what stops one there, and what to do. Exit code 1: something does."""
    from rollouts.remote import doctor as verb_doctor

    return verb_doctor.doctor(
        config, remote=remote, accept_new_host_key=accept_new_host_key, settings=settings or ()
    )


@verb("status")
def status(run: Run, remote: Remote = None, as_json: Json = False) -> Any:
    """Ask the host where a run is."""
    from rollouts.remote import looks

    return looks.status(run, remote=remote)


@verb("attach", launches=True)
def attach(
    run: Run,
    remote: Remote = None,
    *,
    as_json: Json = False,
    accept_new_host_key: AcceptKey = False,
    no_checkpoints: NoCheckpoints = False,
    only: Only = None,
    bwlimit: Bwlimit = None,
) -> Any:
    """Follow a run to its end; go on with a deploy that was interrupted."""
    from rollouts.remote import commands
    from rollouts.remote.run.wanted import ToBring

    wanted = ToBring.parse(no_checkpoints=no_checkpoints, only=only, bwlimit=bwlimit)
    screen = Screen(as_json=as_json)
    return commands.attach(
        run, screen, remote=remote, accept_new_host_key=accept_new_host_key, wanted=wanted
    )


@verb("resume", launches=True)
def resume(
    run: Run,
    *,
    remote: Remotes = None,
    hosts: Hosts = None,
    settings: Settings = None,
    plan: PlanOnly = False,
    as_json: Json = False,
    detach: Detach = False,
    run_id: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the new run.")] = None,
    accept_new_host_key: AcceptKey = False,
    busy_ok: BusyOk = False,
    wait: Wait = False,
    slurm: Slurm = None,
    yes: Annotated[bool, typer.Option("--yes", help="Rent without asking.")] = False,
) -> Any:
    """Go on from the last checkpoint of a run that ended early, as a new run, there or on other hosts."""
    from rollouts.remote import queue_options, rented
    from rollouts.remote import resume as verb_resume
    from rollouts.remote.host.named_hosts import named_hosts

    wish = queue_options.queue_wish(wait=wait, queue=False, at_once=None, busy_ok=busy_ok)
    named = named_hosts(remote or (), hosts)
    by_slurm = queue_options.slurm_wish(slurm, wish, busy_ok=busy_ok, hosts=len(named))
    options = verb_resume.ResumeOptions(
        hosts=named,
        run_id=run_id,
        plan_only=plan,
        detach=detach,
        accept_new_host_key=accept_new_host_key,
        busy_ok=busy_ok,
        queue=by_slurm or wish,
    )
    return rented.resume_run(run, Screen(as_json=as_json), settings or (), options, yes=yes)


@verb("logs")
def logs(
    run: Run,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends.")
    ] = False,
    window: Annotated[
        str, typer.Option(metavar="NAME", help="supervisor, engine-0, trainer; NAME@HOST.")
    ] = "trainer",
    remote: Remote = None,
    as_json: Json = False,
) -> Any:
    """Print what a window of the run's tmux session shows."""
    from rollouts.remote import log_verb

    return log_verb.logs(
        run, Screen(as_json=as_json), remote=remote, window=window, until_end=follow
    )


@verb("pull")
def pull(
    run: Run,
    remote: Remote = None,
    *,
    as_json: Json = False,
    no_checkpoints: NoCheckpoints = False,
    only: Only = None,
    bwlimit: Bwlimit = None,
) -> Any:
    """Bring all results of a run here, verified; one that was cut off goes on where it broke."""
    from rollouts.remote import commands
    from rollouts.remote.run.wanted import ToBring

    wanted = ToBring.parse(no_checkpoints=no_checkpoints, only=only, bwlimit=bwlimit)
    return commands.pull_run(run, Screen(as_json=as_json), remote=remote, wanted=wanted)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line (the console script's entry point).

    A signal that ends it ends what it started too, an rsync or a connection, and removes its temporary files.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` has it ignored
            signal.signal(number, _end)
    app(prog_name="deploy")


if __name__ == "__main__":
    main()
