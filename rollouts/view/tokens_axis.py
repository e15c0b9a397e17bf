"""A run's progress by the tokens that it trained on, so that runs of other batch sizes can be compared. Pure."""

from collections.abc import Sequence

from rollouts.view.run_data import RunData


def tokens_by_step(run: RunData, stage: str) -> dict[int, float]:
    """Return the tokens that were trained on up to each logged step. A step that was not logged counts as the next."""
    series = run.series(stage, "trained_tokens")
    found, total, before = {}, 0.0, 0
    for step, value in zip(series.steps, series.values, strict=True):
        total, before = total + value * (step - before), step
        found[step] = total
    return found


def equal_tokens(runs: Sequence[RunData], stage: str, names: Sequence[str]) -> list[list[str]]:
    """Return a table of metrics at as many tokens as the run with the fewest has; [] where one logged none."""
    tokens = [tokens_by_step(run, stage) for run in runs]
    if not all(tokens):
        return []
    most = min(max(found.values()) for found in tokens)
    table = [[f"at {most:,.0f} tokens of {stage}", *(run.run_id for run in runs)]]
    for name in names:
        cells = [
            _at(run, stage, name, found, most) for run, found in zip(runs, tokens, strict=True)
        ]
        if all(cells):
            table.append([name, *cells])
    return table if len(table) > 1 else []


def _at(run: RunData, stage: str, name: str, tokens: dict[int, float], most: float) -> str:
    """Return a metric's mean over the last tenth of those tokens: one step alone tells little. "" for none."""
    series = run.series(stage, name)
    values = [
        value
        for step, value in zip(series.steps, series.values, strict=True)
        if 0.9 * most < tokens.get(step, -1.0) <= most
    ]
    return f"{sum(values) / len(values):.5g}" if values else ""
