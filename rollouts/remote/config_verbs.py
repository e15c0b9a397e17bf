"""The verbs of `deploy` about configs: new, explain, diff. They reach no host."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config, ConfigError, load_config
from rollouts.config.diff import MISSING, differences
from rollouts.config.explain import FieldDoc, all_fields, explain, section_docs
from rollouts.config.field_types import nearest
from rollouts.config.source import literal
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.new_config import Asked, new_config, tiny_model, wants_tiny
from rollouts.remote.run.run_names import known_run
from rollouts.run_dir import RunDir
from rollouts.view.answer import Answer
from rollouts.view.tables import columns

SHORT = 12  # letters of a digest that are shown


QUESTIONS = {  # of `deploy new`: (what is asked, the answer that Enter gives)
    "mode": ("Stages (sft, rl or sft+rl)", "sft+rl"),
    "model": ("Model: a hub id or a directory", "Qwen/Qwen3-0.6B"),
    "data": ("Data: a .jsonl file or a hub id", None),
    "gpus": ("GPUs of the host (0: its CPU)", "1"),
    "gpu_memory_gib": ("Memory of each GPU, in GiB", "80"),
}
CPU_MEMORY_GIB = 0.0  # no GPU's memory is planned
MODES = ("sft", "rl", "sft+rl")


def answered(
    given: Mapping[str, Any], *, ask: Callable[[str, str | None], str] | None
) -> dict[str, Any]:
    """Return the answers to all QUESTIONS: those that are given, and asked for the others.

    Raises DeployError for a wrong answer, and without `ask` (no terminal) naming every option that is missing.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if found.get("gpus") == 0:
        found.setdefault("gpu_memory_gib", CPU_MEMORY_GIB)
    missing = [name for name in QUESTIONS if name not in found]
    if missing and ask is None:
        options = " ".join(f"--{name.replace('_', '-')} …" for name in missing)
        raise DeployError(
            f"missing: {options}",
            fix="give them, or run it in a terminal, where they are asked for",
        )
    for name in missing:
        if name == "gpu_memory_gib" and found["gpus"] == 0:
            found[name] = CPU_MEMORY_GIB
        elif ask is not None:
            found[name] = _number(name, ask(*QUESTIONS[name]))
    if found["mode"] not in MODES:
        raise DeployError(
            f"--mode {found['mode']!r}: needs {', '.join(MODES)}{nearest(found['mode'], MODES)}"
        )
    return found


def _number(name: str, answer: str) -> Any:
    kind: Callable[[str], Any] = {"gpus": int, "gpu_memory_gib": float}.get(name, str)
    try:
        return kind(answer)
    except ValueError:
        raise DeployError(f"{QUESTIONS[name][0]}: {answer!r} is not a number.") from None


def new(asked: Asked) -> Answer:
    """Write a new config file (`deploy new`)."""
    made = new_config(asked)
    lines = []
    try:
        with asked.file.open("x", encoding="utf-8") as file:
            file.write(made.text)
        if wants_tiny(asked.model):
            shutil.copytree(tiny_model(), asked.model)
            lines = [
                f"wrote {asked.model}/: a model of letters with random weights, to try things with"
            ]
    except OSError as error:
        raise DeployError(
            f"{error.filename or asked.file}: cannot be written: {error.strerror}"
        ) from None
    lines = [f"wrote {asked.file}: every field, with what it means", *lines, *made.memory]
    lines += [f"  {path}={literal(value)}, so that it fits" for path, value in made.changes.items()]
    lines += [f"next: deploy {asked.file} --plan"]
    document = {
        "file": str(asked.file),
        "config": made.config.to_json(),
        "changed_to_fit": dict(made.changes),
    }
    notes = tuple(f"note: {line}" for line in made.unchecked)
    return Answer(document, "\n".join(lines), remarks=notes)


def explain_fields(path: str | None) -> Answer:
    """Explain one field with all below it, or list all of them (`deploy explain`)."""
    try:
        fields = explain(path) if path else all_fields()
    except ConfigError as error:
        raise DeployError(str(error).removeprefix("explain: ")) from None
    document = [
        {"path": field.path, "type": field.type, "meaning": field.meaning} for field in fields
    ]
    return Answer(document, _fields_text(fields))


def _fields_text(fields: tuple[FieldDoc, ...]) -> str:
    docs, lines, section = section_docs(), [], ""
    for field in fields:
        if field.section not in (section, "Config"):
            lines += ["", f"{field.section}: {docs[field.section]}"]
        section = field.section
        lines += [f"{field.path}: {field.type}", f"    {field.meaning}"]
    return "\n".join(lines).strip("\n")


@dataclass(frozen=True)
class Side:
    """A config or a run that is compared."""

    name: str
    config: Config
    digests: dict[str, str]  # of code and environments; {} of a file that never ran


def diff(before: str, after: str) -> Answer:
    """Compare two configs, or two runs with their code and environments (`deploy diff A B`)."""
    first, second = _side(before), _side(after)
    found = [
        (item.path, item.before, item.after) for item in differences(first.config, second.config)
    ]
    kinds = [kind for kind in first.digests if kind in second.digests]
    found += [
        (kind, first.digests[kind], second.digests[kind])
        for kind in kinds
        if first.digests[kind] != second.digests[kind]
    ]
    same = [kind for kind in kinds if first.digests[kind] == second.digests[kind]]
    document = {
        "before": first.name,
        "after": second.name,
        "differences": [{"path": path, "before": old, "after": new} for path, old, new in found],
        "same": same,
    }
    table = columns(
        [
            ["field", first.name, second.name],
            *([path, _shown(a), _shown(b)] for path, a, b in found),
        ]
    )
    words = [
        table if found else "no difference",
        *([f"the same: {', '.join(same)}"] if same else []),
    ]
    return Answer(document, "\n".join(words))


def _shown(value: Any) -> str:
    return "-" if value == MISSING else value if isinstance(value, str) else literal(value)


def _side(name: str) -> Side:
    """Read what `diff` is given: a config file, a run's directory, or a run's name."""
    path = Path(name)
    if path.suffix in (".py", ".json") or path.exists():
        config = _load(path / "config.json" if path.is_dir() else path)
        directory = path if path.is_dir() else path.parent
        return Side(
            name, config, _digests(RunDir(directory)) if (directory / "code").is_dir() else {}
        )
    run = RunDir(Path(known_run(name).local_dir))
    return Side(run.run_id, _load(run.config), _digests(run))


def _load(path: Path) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        raise DeployError(str(error)) from None


def _digests(run: RunDir) -> dict[str, str]:
    """Return what of a run's code and environments is recorded here, each as a short digest."""
    files = {
        "code": run.code_manifest,
        **{f"environment {name}": run.environment(name) for name in ("trainer", "engine")},
    }
    found = {}
    for kind, path in files.items():
        try:
            found[kind] = hashlib.sha256(read_plain(path)).hexdigest()[:SHORT]
        except OSError:  # it never got so far, or an older version recorded none
            continue
    return found
