"""One HTML file about one or several runs, which needs no network: `deploy report`.

Text of a host or a model is escaped; a policy in the page lets no script but our own two run, and nothing be loaded.
"""

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.health.rules import symptoms
from rollouts.run_dir import RunDir
from rollouts.view import charts, report_tables
from rollouts.view.answer_changes import answer_points
from rollouts.view.chart_bundle import javascript
from rollouts.view.escape import escaped
from rollouts.view.rollout_samples import SampleDigest, digest_samples
from rollouts.view.run_data import RunData
from rollouts.view.usage_chart import usage_chart, usage_title

PAGES = Path(__file__).parent / "pages"
SAMPLES_SHOWN = 6
SCATTER_POINTS = 1000


@dataclass(frozen=True)
class ConfigDifference:
    """Where one run's config or code differs from the first run's; rows of (field, before, after)."""

    first: str
    second: str
    rows: tuple[tuple[str, str, str], ...]


def make_report(groups: Sequence[charts.RunGroup], differences: Sequence[ConfigDifference]) -> str:
    """Return the page. It reads each run's rollouts once."""
    named = _named_runs(groups)
    specs: dict[str, charts.Spec] = {}
    stages = [
        _stage(groups, stage, specs)
        for stage in dict.fromkeys(s for _, run in named for s in run.stages)
    ]
    return _render(
        title=", ".join(group.label for group in groups),
        made_at=time.time(),
        groups=groups,
        stages=stages,
        runs=[_run(place, label, run, specs) for place, (label, run) in enumerate(named)],
        comparisons=report_tables.comparisons(named),
        differences=differences,
        specs=specs,
    )


def _named_runs(groups: Sequence[charts.RunGroup]) -> list[tuple[str, RunData]]:
    runs = [run for group in groups for run in group.runs]
    names = [run.run_id for run in runs]
    return [(run.run_id if names.count(run.run_id) == 1 else str(run.path), run) for run in runs]


def _stage(
    groups: Sequence[charts.RunGroup], stage: str, specs: dict[str, charts.Spec]
) -> dict[str, Any]:
    first, rest = report_tables.chart_names([run for group in groups for run in group.runs], stage)
    shown: dict[str, Any] = {"name": stage, "first": [], "rest": []}
    for part, names in (("first", first), ("rest", rest)):
        for name in names:
            shown[part].append(_add(specs, name, charts.curve_chart(groups, stage, name)))
    return shown


def _run(place: int, label: str, run: RunData, specs: dict[str, charts.Spec]) -> dict[str, Any]:
    points = answer_points(run)
    digest = digest_samples(RunDir(run.path).rollouts, shown=SAMPLES_SHOWN, points=SCATTER_POINTS)
    drawn = [
        (f"{stage}: where a step's time goes", charts.time_chart(run, stage))
        for stage in run.stages
    ]
    drawn.append(
        ("reward against length", charts.length_chart(digest.points) if digest.points else None)
    )
    drawn.append((usage_title(run), usage_chart(run)))
    drawn.append(("stages, faults and restarts", charts.timeline_chart(run)))
    return {
        "place": place,
        "label": label,
        "data": run,
        "environment": report_tables.environment_rows(run),
        "symptoms": symptoms(run),
        "answers": report_tables.answer_table(points),
        "evaluations": report_tables.other_evaluations(run),
        "changes": report_tables.changes(points),
        "metrics": report_tables.metric_rows(run),
        "charts": [_add(specs, name, spec) for name, spec in drawn if spec is not None],
        "events": report_tables.event_rows(run),
        "digest": digest,
        "best": [(sample, *report_tables.sample_text(sample)) for sample in digest.best],
        "worst": [(sample, *report_tables.sample_text(sample)) for sample in digest.worst],
        "left_out": _left_out(run, digest),
    }


def _left_out(run: RunData, digest: SampleDigest) -> list[str]:
    """Return what of a run's files could not be used, or was not read."""
    lines = [
        f"{count} line(s) of {file} are damaged, and left out" for file, count in run.damage.items()
    ]
    if digest.damaged:
        lines.append(f"{digest.damaged} line(s) of rollouts.jsonl are damaged, and left out")
    if digest.bytes_read < digest.bytes_total:
        part = f"{digest.bytes_read / 1e6:.0f} of {digest.bytes_total / 1e6:.0f} MB"
        lines.append(
            f"of rollouts.jsonl {part} were read, evenly spread: best and worst are those of that part"
        )
    return [*lines, *run.remarks]


def _add(specs: dict[str, charts.Spec], title: str, spec: charts.Spec) -> tuple[str, str]:
    """Note a chart under an id; return (id, title)."""
    name = f"chart-{len(specs)}"
    specs[name] = spec
    return name, title


def _render(**values: Any) -> str:
    import jinja2
    import markupsafe

    def shown(value: Any) -> Any:
        return (
            escaped(value)
            if isinstance(value, str) and not isinstance(value, markupsafe.Markup)
            else value
        )

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clock"] = lambda at: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    environment.globals.update(
        share_words=report_tables.share_words,
        change_words=report_tables.change_words,
        percent=report_tables.percent,
    )
    scripts = [javascript(), (PAGES / "draw.js").read_text(encoding="utf-8")]
    return environment.get_template("report.html").render(
        **values,
        data=markupsafe.Markup(json_in_html(values["specs"])),
        scripts=[markupsafe.Markup(script) for script in scripts],
        hashes=markupsafe.Markup(" ".join(f"'sha256-{_digest(script)}'" for script in scripts)),
        style=markupsafe.Markup((PAGES / "style.css").read_text(encoding="utf-8")),
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def json_in_html(value: Any) -> str:
    """Return JSON that no text in it can end: for a script element that holds data."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
