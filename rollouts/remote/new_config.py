"""`deploy new`: a complete config from a few choices, fitted to the memory of its GPUs. Reads the data file's rows."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollouts.config import Config, changed
from rollouts.config.field_types import ConfigError, nearest
from rollouts.config.scaffold import Choices, DataChoice, ModelChoice, scaffold
from rollouts.config.source import commented_source
from rollouts.data_formats import FORMAT_NAMES, format_named, format_shown
from rollouts.plain_files import reading
from rollouts.remote.errors import DeployError
from rollouts.remote.inputs.data_files import WEIGHTS, count_parameters, read_model_config
from rollouts.remote.inputs.row_values import row_problem
from rollouts.remote.inputs.shapes import HUB, shape_named
from rollouts.remote.package import folder as package_folder
from rollouts.remote.plan.memory import Card, Models
from rollouts.remote.plan.memory.engine_memory import GIB
from rollouts.remote.plan.memory.fit import misfits, nearest_change
from rollouts.remote.plan.memory.uses import gpu_uses
from rollouts.remote.plan.memory.words import memory_lines

GPUS_MAX, GPU_MEMORY_GIB_MAX = 64, 4096
TINY = "tiny"  # `--model tiny`: the model of this name that comes with rollouts, unless a directory has the name
USABLE_SHARE = 0.98  # of a card, as driver and display leave it
ROWS_LOOKED_AT = 100  # for the format
# Data sets of the hub whose form is known here: (format, subset, split to train on, split to hold out)
HUB_DATA: Mapping[str, tuple[str, str | None, str, str | None]] = {
    "openai/gsm8k": ("gsm8k", "main", "train", "test"),
    "gsm8k": ("gsm8k", "main", "train", "test"),
    "HuggingFaceTB/smol-smoltalk": ("smoltalk", None, "train", "test"),
    "HuggingFaceTB/smoltalk": ("smoltalk", "all", "train", "test"),
    "allenai/ai2_arc": ("multiple_choice", "ARC-Challenge", "train", "test"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options."""

    file: Path
    mode: Literal["sft", "rl", "sft+rl"]
    model: str
    data: str
    rl_data: str | None  # None: `data` for both stages
    format: str | None  # None: found out from the first rows
    reward: str | None
    gpus: int
    gpu_memory_gib: float
    lora: bool
    max_length: int
    max_new_tokens: int
    package_files: str


@dataclass(frozen=True)
class NewConfig:
    """A config that was written down, and what is known of its memory."""

    config: Config
    text: str
    memory: tuple[str, ...]  # a table for people; () on a CPU
    changes: Mapping[str, Any]  # what the memory of the GPUs changed of the usual values
    unchecked: tuple[str, ...] = ()  # choices that nothing here knows: one sentence each


def new_config(asked: Asked) -> NewConfig:
    """Return a config for these choices that has no problems and fits. Raises DeployError."""
    if asked.file.suffix != ".py":
        raise DeployError(
            f"{asked.file}: a config is a .py file.",
            fix=f"deploy new {asked.file.with_suffix('.py')} …",
        )
    if asked.file.exists():
        raise DeployError(
            f"{asked.file} exists already, and is left as it is.",
            fix="choose another name, or remove it",
        )
    _check_numbers(asked)
    model = model_choice(asked.model)
    first = data_choice(asked.data, asked.format)
    second = data_choice(asked.rl_data, None) if asked.rl_data else first
    reward = asked.reward or (
        format_named(second.format).usual_reward if "rl" in asked.mode else None
    )
    if "rl" in asked.mode and reward is None:
        raise DeployError(
            f"--reward is missing: nothing says what an answer to a row of {second.name} earns.",
            fix="name a function of yours (--reward my_rewards.score), or one of rollouts.training.rewards",
        )
    choices = Choices(
        experiment_name=_experiment_name(asked.file),
        mode=asked.mode,
        model=model,
        sft_data=first if "sft" in asked.mode else None,
        rl_data=second if "rl" in asked.mode else None,
        reward=reward,
        gpus=asked.gpus,
        gpu_memory_gib=asked.gpu_memory_gib,
        lora=asked.lora,
        colocated=asked.gpus == 1,
        max_length=asked.max_length,
        max_new_tokens=asked.max_new_tokens,
        package_files=asked.package_files,
    )
    config, changes, memory = _first_that_fits(choices)
    if problems := config.problems():
        raise DeployError(f"{asked.file}: {problems[0]}")
    heading = f"{asked.mode.upper()} of {model.name}. Made by `deploy new`; every value is yours to change.\n\n"
    heading += f"    deploy {asked.file} --plan\n"
    text = commented_source(config, heading)
    return NewConfig(config, text, memory, changes, tuple(_unchecked(asked, model)))


def _unchecked(asked: Asked, model: ModelChoice) -> Iterator[str]:
    """Yield what a choice may have misspelt that no file here can tell."""
    if model.parameters is None and model.name not in HUB:
        yield (
            f"--model {model.name} is not one of the models whose sizes are known here, so its memory is not"
            f" planned{nearest(model.name, HUB)}"
        )
    ours = {reward for name in FORMAT_NAMES if (reward := format_named(name).usual_reward)}
    if asked.reward is not None and "rl" in asked.mode and asked.reward not in ours:
        yield (
            f"--reward {asked.reward} was not looked for: `deploy {asked.file} --plan` does that"
            f"{nearest(asked.reward, ours)}"
        )


def package_files() -> str:
    """Return what the package's lock files are named by in this repository: in a clone they are its own files."""
    return "" if Path("requirements/trainer-cuda.txt").is_file() else "rollouts:"


def _check_numbers(asked: Asked) -> None:
    """Raise DeployError for numbers that are no sizes: those that a person types are checked nowhere else."""
    if not 0 <= asked.gpus <= GPUS_MAX:
        raise DeployError(f"--gpus {asked.gpus}: needs 0 (the host's CPU) to {GPUS_MAX}.")
    if asked.gpus and not 1 <= asked.gpu_memory_gib <= GPU_MEMORY_GIB_MAX:  # NaN is not either
        raise DeployError(
            f"--gpu-memory-gib {asked.gpu_memory_gib:g}: needs 1 to {GPU_MEMORY_GIB_MAX}."
        )
    if "rl" in asked.mode and asked.max_new_tokens >= asked.max_length:
        raise DeployError(
            f"--max-new-tokens {asked.max_new_tokens} leaves no room for a prompt in --max-length {asked.max_length}.",
            fix="raise --max-length, or lower --max-new-tokens",
        )


def model_choice(name: str) -> ModelChoice:
    """Return a model with its size, as far as its directory here or the table of families tells it.

    Raises DeployError for a path that is no model's directory.
    """
    folder = tiny_model() if wants_tiny(name) else Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            near = nearest(
                name.removeprefix("./"), [path.name for path in Path().iterdir() if path.is_dir()]
            )
            raise DeployError(
                f"--model {name}: no such directory{near}",
                fix="a hub id (owner/name), or a directory",
            )
        shape = shape_named(name, {})
        return ModelChoice(
            name=name,
            parameters=None if isinstance(shape, str) else shape.parameters,
            has_weights=True,
        )
    config = read_model_config(folder)
    if config is None:
        raise DeployError(f"--model {name}: its config.json is missing, or is not JSON.")
    has_weights = any(file.suffix in WEIGHTS for file in folder.iterdir())
    parameters = count_parameters(folder, from_weights=has_weights)
    return ModelChoice(name=name, parameters=parameters, has_weights=has_weights, config=config)


def wants_tiny(name: str) -> bool:
    """Return whether the model that comes with rollouts is meant, which is not here yet."""
    return name == TINY and not Path(name).exists()


def tiny_model() -> Path:
    """Return the folder of the package's tiny model: its architecture and tokenizer, without weights."""
    return package_folder() / "models" / "tiny_qwen2"


def data_choice(name: str, format_asked: str | None) -> DataChoice:
    """Return how to read a data set: of a .jsonl file its rows are counted, and its format found out.

    Raises DeployError for a file that is missing, empty or of no known format, and for an unknown data set of the hub
    without a format.
    """
    if format_asked is not None and format_asked not in FORMAT_NAMES:
        raise DeployError(
            f"--format {format_asked!r} is not known{nearest(format_asked, FORMAT_NAMES)}",
            fix=_formats(),
        )
    path = Path(name)
    if path.suffix == ".jsonl" or path.is_file():
        rows = list(_rows(path))
        if not rows:
            raise DeployError(f"{name}: has no rows.")
        found = format_asked or _format_of(name, rows[:ROWS_LOOKED_AT])
        _check_rows(name, found, rows)
        return DataChoice(
            name=name, format=found, split="train", subset=None, rows=len(rows), test_split=None
        )
    if name in HUB_DATA:
        known, subset, split, test = HUB_DATA[name]
        return DataChoice(
            name=name,
            format=format_asked or known,
            split=split,
            subset=subset,
            rows=None,
            test_split=test,
        )
    if format_asked is None:
        raise DeployError(
            f"--data {name}: is no .jsonl file here, and its form is not known.", fix=_formats()
        )
    return DataChoice(
        name=name, format=format_asked, split="train", subset=None, rows=None, test_split=None
    )


def _rows(path: Path) -> list[Any]:
    try:
        with reading(path) as stream:
            # a row may hold U+2028 and its like
            lines = stream.read().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        near = nearest(path.name, [other.name for other in path.parent.glob("*.jsonl")])
        raise DeployError(
            f"--data {path}: no such file{near}", fix="a .jsonl file here, or a hub id"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"--data {path}: cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DeployError(f"{path}:{number}: not JSON: {error}") from None
    return rows


def _check_rows(name: str, row_format: str, rows: list[Any]) -> None:
    """Raise DeployError for the first row that lacks what its format reads, with its number among the rows."""
    for number, row in enumerate(rows, 1):
        if why := row_problem(row_format, row):
            raise DeployError(
                f"{name}: row {number}: {why}.", fix="mend the row, or give another --format"
            )


def _format_of(name: str, rows: list[Any]) -> str:
    """Return the format that these rows have by their keys. Raises DeployError where none fits."""
    if found := format_shown(rows):
        return found.name
    keys = set.intersection(*(set(row) if isinstance(row, dict) else set() for row in rows))
    raise DeployError(
        f"{name}: its rows have {', '.join(sorted(keys)) or 'no keys in common'}, which is none of the known formats.",
        fix=_formats(),
    )


def _formats() -> str:
    return f"give --format one of {', '.join(FORMAT_NAMES)}, and see docs/guide/your-data.md for the keys of each"


def _experiment_name(file: Path) -> str:
    letters = "".join(
        letter if letter.isalnum() and letter.isascii() else "_" for letter in file.stem
    )
    return letters.strip("_")[:48] or "run"


def _first_that_fits(choices: Choices) -> tuple[Config, Mapping[str, Any], tuple[str, ...]]:
    """Fit the config; where trainer and engine apart do not fit, let them share all GPUs. Raises DeployError."""
    try:
        return _fitted(choices)
    except DeployError:
        if choices.gpus < 2 or choices.mode == "sft":
            raise
    return _fitted(dataclasses.replace(choices, colocated=True))


def _fitted(choices: Choices) -> tuple[Config, Mapping[str, Any], tuple[str, ...]]:
    """Return (a config that fits, what memory changed of its values, the table of its memory). Raises DeployError."""
    try:
        config = scaffold(choices)
    except ConfigError as error:
        raise DeployError(str(error)) from None
    if not choices.gpus:
        return config, {}, ()
    whole = int(choices.gpu_memory_gib * GIB)
    cards = {gpu: Card(have=int(USABLE_SHARE * whole), total=whole) for gpu in range(choices.gpus)}
    name = choices.model.name
    known = {name: choices.model.config} if choices.model.config else {}
    models = Models(
        policy=shape_named(name, known), reference=None, parameters=choices.model.parameters
    )
    fields: Mapping[str, Any] = {}
    if misfits(config, models, cards):
        change = nearest_change(config, models, cards, cards)
        if change is None:
            needed = max(use.needed for use in gpu_uses(config, models, cards)) / GIB
            raise DeployError(
                f"{name} does not fit: it needs about {needed:.0f} GiB on a GPU of {choices.gpu_memory_gib:g} GiB.",
                fix="more GPUs (--gpus), larger ones (--gpu-memory-gib)"
                + ("" if choices.lora else ", or --lora"),
            )
        fields = change.fields
    fitted = changed(config, fields)
    return fitted, fields, tuple(memory_lines(list(gpu_uses(fitted, models, cards)), cards))
