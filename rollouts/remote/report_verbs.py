"""The verbs that show runs elsewhere: report, plot and track. They read what is here, and reach no host."""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollouts.config import Config, ConfigError, load_config
from rollouts.config.diff import MISSING, differ_in_seeds_alone, differences
from rollouts.config.source import literal
from rollouts.health.rules import symptoms
from rollouts.remote.errors import DeployError
from rollouts.remote.run.run_names import known_run
from rollouts.run_dir import write_bytes_atomic
from rollouts.view.answer import Answer
from rollouts.view.charts import RunGroup, curve_chart, picture
from rollouts.view.run_data import NotARunError, RunData, read_run
from rollouts.view.run_report import ConfigDifference, make_report
from rollouts.view.track import Tracked, track
from rollouts.view.trackers import TRACKERS

PICTURES = (".png", ".svg")
WIDTH = 520  # pixels of a picture, before it is scaled


@dataclass(frozen=True)
class ReadRun:
    """A run that was named: its records, and its config where this version can read it."""

    data: RunData
    config: Config | None


def plot(
    names: Sequence[str], *, metric: str, stage: str | None, output: Path, by: str = "step"
) -> Answer:
    """Draw one metric of one or several runs into a picture (`deploy plot`)."""
    if output.suffix not in PICTURES:
        raise DeployError(f"-o {output}: the name needs to end with {' or '.join(PICTURES)}.")
    if by not in ("step", "tokens"):
        raise DeployError(f"--by {by!r}: needs step or tokens.")
    runs = _read_all(names)
    chosen = stage or _stage_of(runs, metric)
    if not any(run.data.series(chosen, metric).values for run in runs):
        raise _no_metric(runs, metric, stage)
    with extra("view"):
        drawn = picture(
            curve_chart(seed_groups(runs), chosen, metric, by=by, width=WIDTH), output.suffix[1:]
        )
    _write(output, drawn)
    return Answer(
        {"file": str(output), "stage": chosen, "metric": metric},
        f"wrote {output}: {metric} of {chosen}",
    )


def report(names: Sequence[str], *, output: Path | None) -> Answer:
    """Write one HTML file about one or several runs (`deploy report`)."""
    runs = _read_all(names)
    file = output or Path(f"{runs[0].data.run_id}.html")
    with extra("view"):
        page = make_report(seed_groups(runs), [difference_of(runs[0], run) for run in runs[1:]])
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


def track_runs(names: Sequence[str], *, kind: str, project: str | None) -> Answer:
    """Copy runs into an experiment tracker (`deploy track`). What it writes of its own goes to the screen as it is."""
    if kind not in TRACKERS:
        raise DeployError(f"--to {kind!r} is not a tracker.", fix=f"one of {', '.join(TRACKERS)}")
    lines, found = [], []
    for run in _read_all(names):
        fed = [one for one in run.config.output.fed if one.kind == kind] if run.config else []
        name = project or (
            fed[0].project
            if fed
            else run.config.output.experiment_name
            if run.config
            else run.data.run_id
        )
        with contextlib.redirect_stdout(sys.stderr):  # what the tracker says
            tracked = _tracked(run.data, kind, name)
        found.append({"run": run.data.run_id, "project": name, "steps": tracked.steps})
        lines.append(
            f"{run.data.run_id}: {tracked.steps} new steps of {' and '.join(tracked.stages) or 'no stage'}"
            f" to {kind}, project {name}"
        )
    return Answer({"tracker": kind, "runs": found}, "\n".join(lines))


def _tracked(run: RunData, kind: str, project: str) -> Tracked:
    try:
        return track(run, kind, project)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: {kind} needs it."
        raise DeployError(message, fix=f"pip install 'rollouts[{kind}]'") from None
    except KeyboardInterrupt:
        raise
    except Exception as error:  # a tracker may raise anything; what it took before is noted
        raise DeployError(
            f"{run.run_id}: {kind} failed: {type(error).__name__}: {error}",
            fix="the same command goes on from the last step that it took",
        ) from error


def difference_of(first: ReadRun, second: ReadRun) -> ConfigDifference:
    """Return the fields, the commit and the code that two runs do not share."""
    if first.config is None or second.config is None:
        unread = first if first.config is None else second
        rows = [
            ("config", f"the config of {unread.data.run_id} cannot be read by this version", "")
        ]
    else:
        rows = [
            (d.path, _shown(d.before), _shown(d.after))
            for d in differences(first.config, second.config)
        ]
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
        return [ReadRun(read_run(path), config_of(path)) for path in paths]
    except NotARunError as error:
        fix = "`deploy pull RUN` brings the results of a run here; `deploy ls` lists them"
        raise DeployError(f"{error}.", fix=fix) from None


def _directory(name: str) -> Path:
    path = Path(name)
    return path if path.is_dir() else Path(known_run(name).local_dir)


def config_of(path: Path) -> Config | None:
    """Return the config of a run's directory; None where this version cannot read it."""
    # damaged, or of a version that this one cannot read: shown as unknown
    with contextlib.suppress(ConfigError):
        return load_config(path / "config.json")
    return None


def seed_groups(runs: Sequence[ReadRun]) -> list[RunGroup]:
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
    if (
        first.config is None
        or second.config is None
        or first.data.code_digest != second.data.code_digest
    ):
        return False
    return differ_in_seeds_alone(first.config, second.config)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
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
