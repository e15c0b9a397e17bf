"""Reports on a mixture's rows before training: how many are used, which were left out, and why."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rollouts.data_formats.examples import Example
from rollouts.data_formats.message_keys import untrained
from rollouts.training.types import Sample

EXAMPLES_SHOWN = 3  # rows named per reason; the report counts the rest


@dataclass
class MixtureReport:
    """Counts by reason, each with the first few rows."""

    left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many
    # reason -> the first few rows
    left_out_where: dict[str, list[str]] = field(default_factory=dict)
    # column -> the rows in which a key of ours replaces it
    replaced: dict[str, int] = field(default_factory=dict)

    @property
    def noteworthy(self) -> bool:
        """Return whether a part of the rows is not used."""
        return bool(self.left_out or self.replaced)

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        rows = self.left_out_where.setdefault(reason, [])
        if len(rows) < EXAMPLES_SHOWN:
            rows.append(where)

    def see_columns(self, examples: Iterable[Example]) -> None:
        """Count the columns whose names are taken."""
        for example in examples:
            for column in example.replaced:
                self.replaced[column] = self.replaced.get(column, 0) + 1

    def __str__(self) -> str:
        text = ""
        for reason, count in self.left_out.items():
            rows = self.left_out_where[reason]
            more = ", ..." if count > len(rows) else ""
            text += f"; left out {count}: {reason} ({', '.join(rows)}{more})"
        for column, count in self.replaced.items():
            text += f"; column {column!r} of {count} rows is not used: the prompt has a key of that name"
        return text


@dataclass
class SFTReport(MixtureReport):
    """How many examples were kept, and which were left out, by reason."""

    kept: int = 0  # samples
    split: int = 0  # conversations that became several samples: see `render_conversations`
    split_samples: int = 0  # how many those became
    texts_split: int = 0  # plain texts longer than max_length
    pieces: int = 0  # how many samples those became, without loss
    trained_tokens: int = 0
    total_tokens: int = 0
    # why assistant turns are not trained -> how many
    untrained: dict[str, int] = field(default_factory=dict)

    def keep(self, samples: Sequence[Sample]) -> None:
        self.kept += len(samples)
        self.trained_tokens += sum(int(sum(sample.loss_mask)) for sample in samples)
        self.total_tokens += sum(len(sample.tokens) for sample in samples)

    def see_turns(self, example: Example) -> None:
        """Count the assistant's turns that are read and not trained."""
        for message in example.messages:
            reason = untrained(message, example.where)
            if reason is not None:
                self.untrained[reason] = self.untrained.get(reason, 0) + 1

    def __str__(self) -> str:
        text = f"{self.kept} examples, {self.trained_tokens} of {self.total_tokens} tokens trained"
        if self.split:
            text += f"; {self.split} conversations became {self.split_samples}: the template renders earlier turns anew"
        if self.texts_split:
            text += f"; {self.texts_split} long texts became {self.pieces} pieces"
        for reason, count in self.untrained.items():
            text += f"; {count} assistant turns not trained: {reason}"
        return text + super().__str__()


@dataclass
class PromptReport(MixtureReport):
    """How many prompt rows are used, and which were left out, by reason."""

    kept: int = 0
    longest: int = 0  # tokens, of those kept
    largest_id: int = 0  # of their tokens
    tools_lost: str = ""  # of an environment: why the model does not see them
    ends: str = ""  # the tokens that answers end at, where the chat template writes none

    @property
    def noteworthy(self) -> bool:
        return super().noteworthy or bool(self.tools_lost or self.ends)

    def __str__(self) -> str:
        lost = (
            f"; the model does not see the environment's tools: {self.tools_lost}"
            if self.tools_lost
            else ""
        )
        ends = (
            f"; the chat template writes no token after an answer, which ends at {self.ends}"
            if self.ends
            else ""
        )
        return f"{self.kept} prompts" + super().__str__() + lost + ends
