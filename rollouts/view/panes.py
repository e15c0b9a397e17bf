"""What a live display shows below a run's phases: one pane at a time, and the keys. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.view.escape import one_line
from rollouts.view.fold import View
from rollouts.view.run_data import prompt_text

PANES = ("run", "samples", "warnings")
HELP = "keys: p pause, Tab next pane, d detach, s stop"
SHORT_HELP = "p Tab d s"
ASK = "stop the run after a checkpoint? y: yes, any other key: no"
SAMPLES_SHOWN, WARNINGS_SHOWN = 4, 5


@dataclass
class PaneState:
    """What the user chose on the keyboard."""

    pane: str = PANES[0]
    paused: bool = False
    asks: bool = False  # whether to stop the run
    stop_asked: bool = False
    keys: bool = False  # can be pressed here
    cost: Callable[[], str] = str  # of the rented machine so far; "" for none
    frozen: Sequence[str] = ()  # what is shown while it is paused
    held: int = 0  # lines that stay, and were not printed since

    def press(self, key: str, *, may_stop: bool) -> str:
        """Take a key. Return "detach" or "stop" where that is what it asks for, else ""."""
        if self.asks:
            self.asks, self.stop_asked = False, key in ("y", "Y")
            return "stop" if self.stop_asked else ""
        if key == "p":
            self.paused = not self.paused
        elif key == "\t":
            self.pane = PANES[(PANES.index(self.pane) + 1) % len(PANES)]
        elif key == "s":
            self.asks = may_stop
        return "detach" if key == "d" else ""

    def take_stop(self) -> bool:
        """Return whether a stop was asked for; it is then no longer."""
        asked, self.stop_asked = self.stop_asked, False
        return asked

    def shown(self, lines: Sequence[str]) -> Sequence[str]:
        """Return these lines, or, while it is paused, the last ones before."""
        if not self.paused:
            self.frozen = lines
        return self.frozen


def sample_lines(view: View) -> list[str]:
    """Return the last rollouts: reward, prompt and answer, each text on one line."""
    if not view.samples:
        return ["  no rollouts yet"]
    lines = []
    for row in view.samples[-SAMPLES_SHOWN:]:
        lines.append(f"  step {one_line(row.get('step'))}, reward {_number(row.get('reward'))}")
        lines.append(f"    prompt {one_line(prompt_text(row.get('prompt')))}")
        lines.append(f"    answer {one_line(row.get('response', ''))}")
    return lines


def warning_lines(view: View) -> list[str]:
    """Return the last warnings."""
    if not view.warnings:
        return ["  no warnings"]
    return [f"  {one_line(text)}" for text in view.warnings[-WARNINGS_SHOWN:]]


def status_lines(state: PaneState, *, width: int) -> list[str]:
    """Return what stands at the bottom: a question, a pause, the cost, the keys."""
    lines = [f"  {cost}" for cost in [state.cost()] if cost]
    if state.asks:
        lines.append(ASK)
    elif state.paused:
        lines.append("paused: the run goes on; p to go on looking")
    elif state.keys:
        lines.append(HELP if len(HELP) <= width else SHORT_HELP)
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "?"
