"""The verbs that show runs: report, plot, track, ui. They read what lies here; `ui --remote` what lies on a host."""

import pathlib
from typing import Annotated, Any

import typer

from rollouts.remote import completion
from rollouts.remote.app import Json, Remote, verb
from rollouts.view.screen import Screen

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Names of runs, or directories of results.",
        autocompletion=completion.run_names,
    ),
]


@verb("report")
def report(
    runs: Runs,
    *,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Else <the first run>.html."),
    ] = None,
    as_json: Json = False,
) -> Any:
    """Write one HTML file about runs: curves, answers before and after, samples, faults, what differs."""
    from rollouts.remote import report_verbs

    return report_verbs.report(runs, output=output)


@verb("plot")
def plot(
    runs: Runs,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="What is drawn over steps, such as reward_mean.")
    ],
    output: Annotated[
        pathlib.Path, typer.Option("-o", "--output", metavar="FILE", help="A .png or .svg file.")
    ],
    *,
    stage: Annotated[
        str | None, typer.Option(metavar="sft|rl", help="Of which stage; else the last with it.")
    ] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="step|tokens", help="Over steps, or trained tokens.")
    ] = "step",
    as_json: Json = False,
) -> Any:
    """Draw a metric of runs into a picture, seeds of one config as a band."""
    from rollouts.remote import report_verbs

    return report_verbs.plot(runs, metric=metric, stage=stage, output=output, by=by)


@verb("track")
def track(
    runs: Runs,
    to: Annotated[
        str, typer.Option("--to", metavar="TRACKER", help="wandb, trackio, mlflow or tensorboard.")
    ],
    *,
    project: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="There; else the experiment's name."),
    ] = None,
    as_json: Json = False,
) -> Any:
    """Copy runs into an experiment tracker, from where the last copy ended."""
    from rollouts.remote import report_verbs

    return report_verbs.track_runs(runs, kind=to, project=project)


@verb("ui")
def ui(
    directories: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIRECTORY...]", help="Runs from elsewhere."),
    ] = None,
    *,
    remote: Remote = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Else the first free from 8090.")
    ] = None,
    as_json: Json = False,
) -> Any:
    """Serve a page that shows runs: live, compared, sample by sample."""
    from rollouts.remote import ui_verb

    return ui_verb.ui(
        directories or (),
        Screen(as_json=as_json),
        remote=remote,
        port=port,
    )
