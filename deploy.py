"""The command: `deploy CONFIG`, and what one does with a run afterwards. Parses, and hands over to rollouts.remote.

`deploy --help` is the documentation. Nothing slow is imported until a verb needs it.
"""

import signal
import sys

if sys.argv[0].rpartition("/")[2] in ("deploy", "deploy.py", "rollouts"):  # not where a test imports this
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: interrupted while it is read, it just ends

import contextlib
import pathlib
from typing import Annotated, Any

import typer

from rollouts.remote import life_verbs, look_verbs  # noqa: F401  their verbs are the application's from here on
from rollouts.remote.app import (
    AcceptKey,
    BusyOk,
    Bwlimit,
    Hosts,
    Json,
    NoCheckpoints,
    Only,
    Remote,
    Remotes,
    Run,
    Settings,
    Wait,
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
        version = str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, ValueError, KeyError):  # installed: git would tell of a repository that the environment lies in
        return importlib.metadata.version("rollouts")
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        return f"{version} ({commit})" if commit else version
    return version


@verb(CONFIG_VERB, hidden=True, launches=True)
def run_config(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A file that builds `config = Config(...)`.")],
    *,
    remote: Remotes = None,
    hosts: Hosts = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would happen.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the whole config.")] = False,
    as_json: Json = False,
    detach: Annotated[bool, typer.Option("--detach", help="Launch and return.")] = False,
    run_id: Annotated[str | None, typer.Option(metavar="NAME", help="Name of run and tmux session.")] = None,
    accept_new_host_key: AcceptKey = False,
    busy_ok: BusyOk = False,
    settings: Settings = None,
    skip: Annotated[int, typer.Option(min=0, metavar="N", help="Leave out the first N runs of a sweep.")] = 0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Rent without asking; start a sweep of more than 20 runs.")
    ] = False,
    no_checkpoints: NoCheckpoints = False,
    only: Only = None,
    bwlimit: Bwlimit = None,
    wait: Wait = False,
    queue: Annotated[bool, typer.Option("--queue", help="The same, on any GPUs; a sweep's runs all at once.")] = False,
    at_once: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of queued runs without GPUs.")] = None,
) -> Any:
    """Run the job that CONFIG describes, and follow it."""
    from rollouts.remote import queue_options, read_config, rented, several_hosts, sweep
    from rollouts.remote.host.named_hosts import named_hosts
    from rollouts.remote.run.wanted import ToBring

    wanted = ToBring.parse(no_checkpoints=no_checkpoints, only=only, bwlimit=bwlimit)
    if not sweep.asks_for_several(settings or ()):
        sweep.check_alone(skip=skip, yes=yes and show)
    if show:
        return read_config.show_config(config, settings or ())
    wish = queue_options.queue_wish(wait=wait, queue=queue, at_once=at_once, busy_ok=busy_ok)
    named = named_hosts(remote or (), hosts)
    if len(named) > 1:
        key, screen = accept_new_host_key, Screen(as_json=as_json)
        start = several_hosts.StartOptions(run_id, plan, detach, key, busy_ok, wanted, wish)
        return several_hosts.deploy_on_several(config, screen, named, settings or (), start)
    target = named[0].target if named else None
    if sweep.asks_for_several(settings or ()):
        sweep.check_options(detach=detach, run_id=run_id, all_at_once=queue)
        options = sweep.SweepOptions(
            remote=target,
            skip=skip,
            yes=yes,
            accept_new_host_key=accept_new_host_key,
            busy_ok=busy_ok,
            queue=wish,
            all_at_once=queue,
            detach=detach,
            wanted=wanted,
        )
        return sweep.sweep(config, Screen(as_json=as_json), settings or (), options, plan_only=plan)
    chosen = rented.RentOptions(
        plan_only=plan, detach=detach, run_id=run_id, busy_ok=busy_ok, yes=yes, wanted=wanted, queue=wish
    )
    screen = Screen(as_json=as_json)
    return rented.deploy(config, screen, settings or (), chosen, remote=target, accept_new_host_key=accept_new_host_key)


@verb(HOST_VERB, hidden=True)
def check_host(remote: Remote = None, as_json: Json = False, accept_new_host_key: AcceptKey = False) -> Any:
    """Check a host, and list the runs on it."""
    from rollouts.remote import looks

    return looks.check_host(remote, accept_new_host_key=accept_new_host_key)


@verb("doctor")
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A config that is to run there.")] = None,
    *,
    remote: Remote = None,
    settings: Settings = None,
    as_json: Json = False,
    accept_new_host_key: AcceptKey = False,
) -> Any:
    """Examine a host before a run: what stops one there, and what to do. Exit code 1: something does."""
    from rollouts.remote import doctor as verb_doctor

    return verb_doctor.doctor(config, remote=remote, accept_new_host_key=accept_new_host_key, settings=settings or ())


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
    return commands.attach(run, screen, remote=remote, accept_new_host_key=accept_new_host_key, wanted=wanted)


@verb("resume", launches=True)
def resume(
    run: Run,
    remote: Remote = None,
    *,
    settings: Settings = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would happen.")] = False,
    as_json: Json = False,
    detach: Annotated[bool, typer.Option("--detach", help="Launch and return.")] = False,
    run_id: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the new run.")] = None,
    accept_new_host_key: AcceptKey = False,
    busy_ok: BusyOk = False,
    wait: Wait = False,
) -> Any:
    """Go on from the last checkpoint of a run that ended early, as a new run, here or on another host."""
    from rollouts.remote import queue_options
    from rollouts.remote import resume as verb_resume

    options = verb_resume.ResumeOptions(
        remote=remote,
        run_id=run_id,
        plan_only=plan,
        detach=detach,
        accept_new_host_key=accept_new_host_key,
        busy_ok=busy_ok,
        queue=queue_options.queue_wish(wait=wait, queue=False, at_once=None, busy_ok=busy_ok),
    )
    return verb_resume.resume(run, Screen(as_json=as_json), settings or (), options)


@verb("logs")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    window: Annotated[str, typer.Option(metavar="NAME", help="supervisor, engine-0, trainer; NAME@HOST.")] = "trainer",
    remote: Remote = None,
    as_json: Json = False,
) -> Any:
    """Print what a window of the run's tmux session shows."""
    from rollouts.remote import commands

    return commands.logs(run, Screen(as_json=as_json), remote=remote, window=window, until_end=follow)


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


@verb("new")
def new(
    file: Annotated[pathlib.Path, typer.Argument(metavar="FILE.py", help="The config file to write.")],
    *,
    mode: Annotated[str | None, typer.Option(metavar="sft|rl|sft+rl", help="The stages.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="A hub id, a directory, or tiny, which comes along.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="NAME", help="A .jsonl file, or a hub id.")] = None,
    rl_data: Annotated[str | None, typer.Option(metavar="NAME", help="For rl, where it has data of its own.")] = None,
    data_format: Annotated[str | None, typer.Option("--format", help="Of its rows; else found by their keys.")] = None,
    reward: Annotated[str | None, typer.Option(metavar="MODULE.FUNCTION", help="What an answer earns, for rl.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=64, help="GPUs of the host; 0: its CPU.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of each.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters alone.")] = False,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a conversation.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, for rl.")] = 512,
    as_json: Json = False,
) -> Any:
    """Write a config: every field spelled out, fitted to the memory of the GPUs."""
    from rollouts.remote import config_verbs
    from rollouts.remote.new_config import Asked, package_files

    given = {"mode": mode, "model": model, "data": data, "gpus": gpus, "gpu_memory_gib": gpu_memory_gib}
    ask = _ask if sys.stdin.isatty() and not as_json else None
    return config_verbs.new(
        Asked(
            file=file,
            rl_data=rl_data,
            format=data_format,
            reward=reward,
            lora=lora,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            package_files=package_files(),
            **config_verbs.answered(given, ask=ask),
        )
    )


def _ask(question: str, default: str | None) -> str:
    try:
        return str(typer.prompt(question, default=default))
    except typer.Abort:  # Ctrl-C or Ctrl-D
        raise KeyboardInterrupt from None


@verb("explain")
def explain(
    field: Annotated[str | None, typer.Argument(metavar="[FIELD]", help="Such as rl.baseline; else all.")] = None,
    as_json: Json = False,
) -> Any:
    """Explain a field of the config, or all of them: type, choices, meaning."""
    from rollouts.remote import config_verbs

    return config_verbs.explain_fields(field)


@verb("data")
def data(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config file.")],
    rows: Annotated[int, typer.Option(min=0, max=1000, help="Rows shown of each mixture.")] = 3,
    remote: Remote = None,
    as_json: Json = False,
    accept_new_host_key: AcceptKey = False,
) -> Any:
    """Show the data as the model will see it: first rows, lengths, and what is left out."""
    from rollouts.remote import data_verb

    screen = Screen(as_json=as_json)
    return data_verb.show_data(config, screen, rows=rows, remote=remote, accept_new_host_key=accept_new_host_key)


@verb("offers")
def offers(
    *,
    gpu: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A part of its name; several: any.")] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="GPUs of the machine.")] = 1,
    vram: Annotated[float | None, typer.Option(min=1, metavar="GB", help="Memory of each GPU, at least.")] = None,
    max_price: Annotated[float | None, typer.Option(min=0, metavar="USD", help="An hour, for the machine.")] = None,
    region: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A part of its name; several: any.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Spot machines too, which may be taken away.")] = False,
    disk: Annotated[int, typer.Option(min=1, metavar="GIB", help="Disk that the price is to hold.")] = 50,
    as_json: Json = False,
) -> Any:
    """List what RunPod, Vast, Lambda and Prime Intellect would rent out, the cheapest first."""
    from rollouts.cloud.machine_types import MachineNeeds
    from rollouts.remote import cloud_verbs

    return cloud_verbs.offers(
        MachineNeeds(
            gpu_types=tuple(gpu or ()),
            gpus=count,
            vram_gb_min=vram,
            price_per_hour_max=max_price,
            regions=tuple(region or ()),
            spot=spot,
            disk_gib=disk,
        )
    )


@verb("machines")
def machines(
    action: Annotated[str | None, typer.Argument(metavar="[end]", help="End a machine; without it, list all.")] = None,
    machine: Annotated[str | None, typer.Argument(metavar="[MACHINE]", help="Its name.")] = None,
    *,
    orphans: Annotated[bool, typer.Option("--orphans", help="End all that were rented here and bill.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="End one that was rented from elsewhere, or with another key.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """List the machines that were rented from clouds, or end some of them."""
    from rollouts.remote import cloud_verbs

    if action not in (None, "end"):
        raise typer.BadParameter(f"{action!r}: only `end` can be done to a machine.")
    if action is None:
        return cloud_verbs.machines()
    return cloud_verbs.end_machines(machine, orphans=orphans, yes=yes)


@verb("guard")
def guard(as_json: Json = False) -> Any:
    """End each rented machine when its time is up; returns when none is left. A deploy starts it by itself."""
    from rollouts.remote import cloud_verbs

    return cloud_verbs.guard(Screen(as_json=as_json).remark)


@verb("diff")
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A config file, a run, or a run's directory.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: Json = False,
) -> Any:
    """Compare two configs or runs, field by field; of runs their code and environments too."""
    from rollouts.remote import config_verbs

    return config_verbs.diff(before, after)


def main() -> None:
    """Run the command line (the console script's entry point)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app(prog_name="deploy")


if __name__ == "__main__":
    main()
