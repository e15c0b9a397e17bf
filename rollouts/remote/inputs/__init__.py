"""What a config names, looked through before anything is built: paths, dotted names, rows. Nothing is imported."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config, DatasetSpec
from rollouts.config.checks.needs import PACKAGE_PREFIX
from rollouts.data_formats import format_named
from rollouts.remote.errors import Problem
from rollouts.remote.inputs.code_files import look_at_code
from rollouts.remote.inputs.data_files import (
    RowCount,
    absent_columns,
    contents_problems,
    count_parameters,
    count_rows,
    read_model_config,
)
from rollouts.remote.inputs.paths import SentFiles, path_problem, pointer_problem
from rollouts.remote.inputs.row_values import row_problems


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was found behind the names."""

    paths: dict[str, Problem]  # name in the config -> why it would not reach the host
    problems: tuple[Problem, ...]  # the others
    syntax: tuple[Problem, ...]  # files that this Python cannot parse; a newer one might
    notes: tuple[str, ...]
    rows: dict[str, tuple[RowCount, ...]]  # "sft_mixture" -> of each of its data sets
    parameters: int | None  # of a model whose files are here
    # config.json of those; None: it cannot be read
    model_configs: Mapping[str, Mapping[str, Any] | None]


NO_INPUTS = Inputs(
    paths={}, problems=(), syntax=(), notes=(), rows={}, parameters=None, model_configs={}
)


def named_paths(config: Config) -> list[str]:
    """Return the model and data names of a config: hub ids, or paths; a replay's rollouts.jsonl too."""
    return list(dict.fromkeys(name for _, name in _named(config)))


def naming_fields(config: Config, name: str) -> str:
    """Return the fields that name a path, as `--set` writes them: "data.sft_mixture.0.name, model.name"."""
    return ", ".join(field for field, other in _named(config) if other == name)


def _named(config: Config) -> Iterator[tuple[str, str]]:
    rl = config.rl if "rl" in config.stages else None
    yield "model.name", config.model.name
    for mixture, specs in _mixtures(config):
        for at, spec in enumerate(specs):
            if not format_named(spec.format).made_here:
                yield f"data.{mixture}.{at}.name", spec.name
    if rl and not config.uses_engine:
        yield "rl.sampling.source", rl.sampling.source
    if rl and rl.kl and rl.kl.reference:
        yield "rl.kl.reference", rl.kl.reference


def look_through(
    config: Config, sent: SentFiles, requirements: Sequence[str], package: SentFiles | None = None
) -> Inputs:
    """Look at everything that the config names, as it lies here.

    `package`: the files of rollouts itself, where they are not among those of the repository.
    """
    names = [name for name in named_paths(config) if not os.path.isabs(name)]
    code = look_at_code(config, sent, requirements, package)
    paths = {name: problem for name in names if (problem := path_problem(sent.locate(name)))}
    problems = [*code.problems, *_contents(config, sent, names), *_pins(config, sent.root)]
    problems += row_problems(_read_mixtures(config), sent)
    if config.rl is not None:
        problems += _columns(config, config.rl.reward_fn, code.reward_keys, sent)
    return Inputs(
        paths=paths,
        problems=tuple(dict.fromkeys(problems)),
        syntax=tuple(code.syntax),
        notes=tuple(code.notes),
        rows={
            name: tuple(count_rows(spec, sent) for spec in specs)
            for name, specs in _mixtures(config)
        },
        parameters=_parameters(config, sent),
        model_configs=dict(_model_configs(config, sent)),
    )


def _mixtures(config: Config) -> list[tuple[str, list[DatasetSpec]]]:
    return [
        (name, getattr(config.data, name)) for name in ("sft_mixture", "rl_mixture", "eval_mixture")
    ]


def _read_mixtures(config: Config) -> list[tuple[str, list[DatasetSpec]]]:
    """Return the mixtures that the config's stages read."""
    unread = [] if "sft" in config.stages else ["sft_mixture"]
    unread += [] if config.uses_engine else ["rl_mixture"]
    return [(name, specs) for name, specs in _mixtures(config) if name not in unread]


def _columns(
    config: Config, reward: str | None, keys: dict[str, int], sent: SentFiles
) -> Iterator[Problem]:
    data = ", ".join(spec.name for spec in config.data.rl_mixture)
    for key in absent_columns(config.data.rl_mixture, keys, sent):
        line = f"line {keys[key]} of its module reads it; " if keys[key] else ""
        yield Problem(
            f"rl.reward.fn={reward!r} needs the column {key!r}, which no row has.",
            found=f"{line}rows of {data}",
            fix="add the column to the rows, or name another reward",
        )


def _contents(config: Config, sent: SentFiles, names: Sequence[str]) -> Iterator[Problem]:
    for name in names:
        if name == config.model.name:
            pretrained = config.model.init == "pretrained"
            yield from contents_problems(sent, name, kind="model", weights=pretrained)
        elif config.rl and config.rl.kl and name == config.rl.kl.reference:
            yield from contents_problems(sent, name, kind="model", weights=True)
        else:
            yield from contents_problems(sent, name, kind="data", weights=False)


def _pins(config: Config, root: Path) -> Iterator[Problem]:
    """Return the files whose text goes along in the plan: pointers have none."""
    lock = config.engine.requirements_file if config.engine and config.uses_engine else None
    for file in (config.host.constraints_file, lock):
        problem = (
            pointer_problem(root, file) if file and not file.startswith(PACKAGE_PREFIX) else None
        )
        if problem is not None:
            yield problem


def _model_folder(name: str, sent: SentFiles) -> Path | None:
    """Return where a model's files lie here; None for one of the hub or of the host."""
    if os.path.isabs(name):
        return None
    where = sent.locate(name)
    return sent.root / where.file if where.state == "sent" and where.file in sent.folders else None


def _parameters(config: Config, sent: SentFiles) -> int | None:
    folder = _model_folder(config.model.name, sent)
    return (
        None
        if folder is None
        else count_parameters(folder, from_weights=config.model.init == "pretrained")
    )


def _model_configs(
    config: Config, sent: SentFiles
) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    reference = config.rl.kl.reference if config.rl and config.rl.kl else None
    for name in filter(None, (config.model.name, reference)):
        folder = _model_folder(name, sent)
        if folder is not None:
            yield name, read_model_config(folder)
