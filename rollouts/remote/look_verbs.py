"""The verbs that show runs: report, plot. They read what lies here."""

import pathlib
from typing import Annotated, Any

import typer

from rollouts.remote.app import Json, verb

Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs, or directories of results.")]


@verb("report")
def report(
    runs: Runs,
    *,
    output: Annotated[
        pathlib.Path | None, typer.Option("-o", "--output", metavar="FILE", help="Else <the first run>.html.")
    ] = None,
    as_json: Json = False,
) -> Any:
    """Write one HTML file about runs: curves, answers before and after, samples, faults, what differs."""
    from rollouts.remote import report_verbs

    return report_verbs.report(runs, output=output)


@verb("plot")
def plot(
    runs: Runs,
    metric: Annotated[str, typer.Option(metavar="NAME", help="What is drawn over steps, such as reward_mean.")],
    output: Annotated[pathlib.Path, typer.Option("-o", "--output", metavar="FILE", help="A .png or .svg file.")],
    *,
    stage: Annotated[str | None, typer.Option(metavar="sft|rl", help="Of which stage; else the last with it.")] = None,
    as_json: Json = False,
) -> Any:
    """Draw a metric of runs into a picture, seeds of one config as a band."""
    from rollouts.remote import report_verbs

    return report_verbs.plot(runs, metric=metric, stage=stage, output=output)
