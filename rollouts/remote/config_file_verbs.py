"""The verbs about a config file: write one, explain its fields, show its data, compare it with another."""

import pathlib
import sys
from typing import Annotated, Any

import typer

from rollouts.remote import completion
from rollouts.remote.app import AcceptKey, Json, Remote, verb
from rollouts.view.screen import Screen


@verb("new")
def new(
    file: Annotated[
        pathlib.Path, typer.Argument(metavar="FILE.py", help="The config file to write.")
    ],
    *,
    mode: Annotated[str | None, typer.Option(metavar="sft|rl|sft+rl", help="The stages.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A hub id, a directory, or tiny, which comes along."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="A .jsonl file, or a hub id.")
    ] = None,
    rl_data: Annotated[
        str | None, typer.Option(metavar="NAME", help="For rl, where it has data of its own.")
    ] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", help="Of its rows; else found by their keys.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="MODULE.FUNCTION", help="What an answer earns, for rl.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, max=64, help="GPUs of the host; 0: its CPU.")
    ] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of each.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters alone.")] = False,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a conversation.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, for rl.")] = 512,
    as_json: Json = False,
) -> Any:
    """Write a config: every field spelled out, fitted to the memory of the GPUs."""
    from rollouts.remote import config_verbs
    from rollouts.remote.new_config import Asked, package_files

    given = {
        "mode": mode,
        "model": model,
        "data": data,
        "gpus": gpus,
        "gpu_memory_gib": gpu_memory_gib,
    }
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
    field: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIELD]",
            help="Such as rl.baseline; else all.",
            autocompletion=completion.fields,
        ),
    ] = None,
    as_json: Json = False,
) -> Any:
    """Explain a field of the config, or all of them: type, choices, meaning."""
    from rollouts.remote import config_verbs

    return config_verbs.explain_fields(field)


@verb("data")
def data(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="A config file.", autocompletion=completion.config_files
        ),
    ],
    rows: Annotated[int, typer.Option(min=0, max=1000, help="Of each mixture.")] = 3,
    remote: Remote = None,
    as_json: Json = False,
    accept_new_host_key: AcceptKey = False,
) -> Any:
    """Show the data as the model will see it: first rows, lengths, and what is left out."""
    from rollouts.remote import data_verb

    screen = Screen(as_json=as_json)
    return data_verb.show_data(
        config, screen, rows=rows, remote=remote, accept_new_host_key=accept_new_host_key
    )


@verb("diff")
def diff(
    before: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A config file, a run, or a run's directory.",
            autocompletion=completion.configs_and_runs,
        ),
    ],
    after: Annotated[
        str,
        typer.Argument(metavar="B", help="Another.", autocompletion=completion.configs_and_runs),
    ],
    as_json: Json = False,
) -> Any:
    """Compare two configs or runs, field by field; of runs their code and environments too."""
    from rollouts.remote import config_verbs

    return config_verbs.diff(before, after)
