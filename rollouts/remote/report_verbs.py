"""The verbs that draw runs: report and plot. They read what is here, and reach no host."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollouts.config import Config, ConfigError, load_config
from rollouts.config.diff import MISSING, differ_in_seeds_alone, differences
from rollouts.config.source import literal
from rollouts.remote.errors import DeployError
from rollouts.remote.run.run_names import known_run
from rollouts.run_dir import write_bytes_atomic
from rollouts.view.answer import Answer
from rollouts.view.charts import RunGroup, curve_chart, picture
from rollouts.view.run_data import NotARunError, RunData, read_run
from rollouts.view.run_report import ConfigDifference, make_report
from rollouts.view.symptoms import symptoms

PICTURES = (".png", ".svg")
WIDTH = 520  # pixels of a picture, before it is scaled


@dataclass(frozen=True)
class ReadRun:
    """A run that was named: its records, and its config where this version can read it."""

    data: RunData
    config: Config | None


def plot(names: Sequence[str], *, metric: str, stage: str | None, output: Path) -> Answer:
    """Draw one metric of one or several runs into a picture (`deploy plot`)."""
    if output.suffix not in PICTURES:
        raise DeployError(f"-o {output}: the name needs to end with {' or '.join(PICTURES)}.")
    runs = _read_all(names)
    chosen = stage or _stage_of(runs, metric)
    if not any(run.data.series(chosen, metric).values for run in runs):
        raise _no_metric(runs, metric, stage)
    with _extra("view"):
        drawn = picture(curve_chart(_groups(runs), chosen, metric, width=WIDTH), output.suffix[1:])
    _write(output, drawn)
    return Answer({"file": str(output), "stage": chosen, "metric": metric}, f"wrote {output}: {metric} of {chosen}")


def report(names: Sequence[str], *, output: Path | None) -> Answer:
    """Write one HTML file about one or several runs (`deploy report`)."""
    runs = _read_all(names)
    file = output or Path(f"{runs[0].data.run_id}.html")
    with _extra("view"):
        page = make_report(_groups(runs), [_difference(runs[0], run) for run in runs[1:]])
    _write(file, page.encode())
    found = [(run.data.run_id, symptom) for run in runs for symptom in symptoms(run.data)]
    document = {
        "file": str(file),
        "bytes": len(page.encode()),
        "runs": [run.data.run_id for run in runs],
        "symptoms": [{"run": name, **dataclasses.asdict(symptom)} for name, symptom in found],
    }
    lines = [f"wrote {file}: {len(page.encode()) / 1e6:.1f} MB, which opens without a network"]
    lines += [f"{name}: {symptom.cause}: {symptom.detail}" for name, symptom in found]
    return Answer(document, "\n".join(lines))


def _difference(first: ReadRun, second: ReadRun) -> ConfigDifference:
    """Return the fields, the commit and the code that two runs do not share."""
    if first.config is None or second.config is None:
        unread = first if first.config is None else second
        rows = [("config", f"the config of {unread.data.run_id} cannot be read by this version", "")]
    else:
        rows = [(d.path, _shown(d.before), _shown(d.after)) for d in differences(first.config, second.config)]
    for name in ("commit", "code_digest"):
        before, after = getattr(first.data, name), getattr(second.data, name)
        rows += [(name, before, after)] if before != after else []
    return ConfigDifference(first.data.run_id, second.data.run_id, tuple(rows))


def _shown(value: object) -> str:
    return str(value) if value == MISSING else literal(value)


def _stage_of(runs: Sequence[ReadRun], metric: str) -> str:
    """Return the last stage that logged a metric; "" where none did."""
    found = [s for run in runs for s in run.data.stages if metric in run.data.metric_names(s)]
    return found[-1] if found else ""


def _no_metric(runs: Sequence[ReadRun], metric: str, stage: str | None) -> DeployError:
    names = {f"{s}: {', '.join(run.data.metric_names(s))}" for run in runs for s in run.data.stages}
    where = f" in stage {stage}" if stage else ""
    return DeployError(
        f"no step of {' or '.join(run.data.run_id for run in runs)} logged {metric!r}{where}.",
        found="\n".join(sorted(names)) or "no metrics yet",
        fix="--metric takes one of these; docs/reference/metrics.md explains them",
    )


# --- runs -------------------------------------------------------------------------------------------------------------


def _read_all(names: Sequence[str]) -> list[ReadRun]:
    """Read runs by name or by directory, each once. Raises DeployError."""
    paths = dict.fromkeys(_directory(name).resolve() for name in names)
    try:
        return [ReadRun(read_run(path), _config(path)) for path in paths]
    except NotARunError as error:
        fix = "`deploy pull RUN` brings the results of a run here; `deploy ls` lists them"
        raise DeployError(f"{error}.", fix=fix) from None


def _directory(name: str) -> Path:
    path = Path(name)
    return path if path.is_dir() else Path(known_run(name).local_dir)


def _config(path: Path) -> Config | None:
    with contextlib.suppress(ConfigError):  # damaged, or of a version that this one cannot read: shown as unknown
        return load_config(path / "config.json")
    return None


def _groups(runs: Sequence[ReadRun]) -> list[RunGroup]:
    """Put runs together that differ in their seeds alone."""
    together: list[list[ReadRun]] = []
    for run in runs:
        fitting = next((group for group in together if _is_one_experiment(group[0], run)), None)
        if fitting is None:
            together.append([run])
        else:
            fitting.append(run)
    names = Counter(run.data.run_id for run in runs)
    groups = []
    for members in together:
        first = members[0].data
        label = first.run_id if names[first.run_id] == 1 else str(first.path)
        label += f" and {len(members) - 1} more seed(s)" if len(members) > 1 else ""
        groups.append(RunGroup(label, tuple(run.data for run in members)))
    return groups


def _is_one_experiment(first: ReadRun, second: ReadRun) -> bool:
    if first.config is None or second.config is None or first.data.code_digest != second.data.code_digest:
        return False
    return differ_in_seeds_alone(first.config, second.config)


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra is missing, in place of a module that nobody knows."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: charts need the {name!r} extra."
        raise DeployError(
            message, fix=f"pip install 'rollouts[{name}]', in a clone pip install -e '.[{name}]'"
        ) from None


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes_atomic(path, content)
    except OSError as error:
        raise DeployError(f"{path}: cannot be written: {error.strerror or error}.") from None
