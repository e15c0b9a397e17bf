"""What the trainer's own answers to held-out rows may cost: the same numbers for the plan, the trainer and its memory.

A stage answers in its own process where no engine does: sft, and rl from saved rollouts. Pure, standard library.
"""

from dataclasses import dataclass
from typing import Literal

from rollouts.config.schema import Sections
from rollouts.data_formats import format_named

BATCH_ROWS = 256  # sequences at once, where eval.in_process_batch_tokens allows as many


@dataclass(frozen=True)
class AnswerLimits:
    """What a stage's answers in process may take, each time that it answers."""

    rows: int  # held-out rows, from the first; -1: all
    samples: int  # sampled answers of a row beside the greedy one
    new_tokens: int  # of an answer
    batch_rows: int  # sequences at once
    batch_tokens: (
        int  # tokens at once, whose keys and values are held: prompts, padding and answers
    )

    def new_tokens_max(self, rows: int) -> int:
        """Return the most tokens that are sampled for `rows` held-out rows."""
        answered = rows if self.rows == -1 else min(rows, self.rows)
        return answered * (1 + self.samples) * self.new_tokens


def answer_limits(config: Sections, stage: Literal["sft", "rl"]) -> AnswerLimits | None:
    """Return the limits of `stage`'s answers in process, None where it gives none."""
    asked = any(format_named(spec.format).has_prompts for spec in config.data.eval_mixture)
    in_process = stage in config.stages and (stage == "sft" or not config.uses_engine)
    if not (asked and in_process and config.eval.in_process_rows):
        return None
    return AnswerLimits(
        rows=config.eval.in_process_rows,
        samples=config.eval.num_samples,
        new_tokens=answer_tokens(config),
        batch_rows=BATCH_ROWS,
        batch_tokens=config.eval.in_process_batch_tokens,
    )


def answer_tokens(config: Sections) -> int:
    """Return how long an answer in process may be: as long as RL's at most, so that both stages measure the same."""
    new_tokens = config.eval.in_process_new_tokens
    return new_tokens if config.rl is None else min(new_tokens, config.rl.max_new_tokens)


def row_tokens_max(config: Sections) -> int:
    """Return the most tokens that one row's answers hold at once. Longer prompts are left out before."""
    room = (
        config.data.max_length
        if config.rl is not None
        else config.data.max_length + answer_tokens(config)
    )
    return room * max(1, config.eval.num_samples)
