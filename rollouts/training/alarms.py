"""What shows that a run learns nothing: from its logged metrics and evaluations to sentences. Pure; each cause once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = 5  # logged steps in a row until a cause counts; all of a run that has fewer
FALL_MIN = 0.05  # by how much an evaluation has to fall, beside by half: a few rows more or less are chance
JUDGED = ("exact_match", "reward")  # evaluations that are better when higher


@dataclass(frozen=True)
class Alarm:
    """A `warning` event: its cause, by a name that programs can know, and the sentence for people."""

    cause: str
    message: str


def _all_zero(metrics: Mapping[str, Any]) -> bool:
    found = [metrics[key] for key in ("loss", "grad_norm", "reward_mean") if key in metrics]
    return len(found) >= 2 and all(value == 0 for value in found)


def _one(key: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda metrics: metrics.get(key) == 1.0


CAUSES: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "all_zero": (
        _all_zero,
        "loss, gradient and reward were 0 in each of the last {steps} logged steps: nothing is learned. Fix: a reward "
        "that some answers earn, easier prompts, or SFT first",
    ),
    "no_contrast": (
        _one("groups_zero_std_frac"),
        "in each of the last {steps} logged steps no group had contrast: all samples of a prompt earned the same, so "
        "their advantages are 0. Fix: prompts that the model sometimes gets right, more samples, a higher temperature",
    ),
    "all_truncated": (
        _one("truncated_frac"),
        "in each of the last {steps} logged steps every response ended at max_new_tokens: the model does not stop. "
        "Fix: a larger max_new_tokens, or a model that has learned its end of turn",
    ),
}


@dataclass
class Alarms:
    """Looks at each logged step and evaluation of a stage that logs `steps_total` steps."""

    steps_total: int
    _streaks: dict[str, int] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    # by metric: the best so far, and where
    _best: dict[str, tuple[float, str]] = field(default_factory=dict)

    def of_step(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Return the causes that have now lasted long enough, each once."""
        needed, found = max(1, min(STEPS, self.steps_total)), []
        for cause, (holds, message) in CAUSES.items():
            self._streaks[cause] = self._streaks.get(cause, 0) + 1 if holds(metrics) else 0
            if self._streaks[cause] >= needed:
                found += self._once(cause, message.format(steps=needed))
        return found

    def of_evaluation(self, where: str, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return whether one of `metrics`, of all held-out rows, has fallen to half of its best. `where`: "rl
        step 20"."""
        found = []
        for name in (name for name in JUDGED if name in metrics):
            value, (best, at) = metrics[name], self._best.get(name, (metrics[name], where))
            if best > 0 and value <= best / 2 and best - value >= FALL_MIN:
                text = f"{name} on the held-out rows fell from {best:.4f} ({at}) to {value:.4f} ({where})"
                found += self._once(
                    f"evaluation_fell_{name}", f"{text}. Fix: go on from the better checkpoint"
                )
            if value >= best:
                self._best[name] = (value, where)
        return found

    def _once(self, cause: str, message: str) -> list[Alarm]:
        if cause in self._told:
            return []
        self._told.add(cause)
        return [Alarm(cause, message)]
