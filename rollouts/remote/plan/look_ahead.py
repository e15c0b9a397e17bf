"""What a run would do, as far as it is known beforehand: its sizes in a researcher's words, and likely mistakes.

Pure: config + facts + code → problems, warnings, a summary.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rollouts.config import Config, RLConfig, SFTConfig
from rollouts.config.answer_limits import answer_limits
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.inputs.data_files import RowCount
from rollouts.remote.plan.problems import required_ports
from rollouts.remote.repository import Code

RATES = ("unembedding_lr", "embedding_lr", "matrix_lr")
RANDOM_RATE_PROBLEM = (
    0.1  # AdamW moves each weight by about its rate, and weights are drawn around 0.02
)
RANDOM_RATE_HIGH = 0.015
RANDOM_RATE_LOW = 5e-5
MUON_RATE_PROBLEM = 1.0
UNTRACKED_MB_LARGE = 100.0
BYTES_FLOAT32 = 4


@dataclass(frozen=True)
class Rows:
    """A mixture's rows. `exact`: counted, all of them; else at most so many (None: unknown)."""

    count: int | None
    exact: bool


def mixture_rows(code: Code, name: str) -> Rows:
    """Return the rows of data.<name>, as they were counted here."""
    counts: Sequence[RowCount] = code.inputs.rows.get(name, ())
    known = [count.rows for count in counts if count.rows is not None]
    whole = 0 < len(known) == len(counts)
    return Rows(
        sum(known) if whole else None, whole and all(count.how == "counted" for count in counts)
    )


# --- problems -------------------------------------------------------------------------------------------------------


def ahead_problems(config: Config, facts: HostFacts, code: Code, target: str) -> Iterator[Problem]:
    """Return what would end or spoil the run later, and is known already now."""
    yield from _port_problems(config, facts, target)
    yield from code.inputs.problems
    version = [int(part) for part in facts.python_version.split(".")[:2] if part.isdigit()]
    # else a line that this Python cannot parse may be right there
    if version <= [*sys.version_info[:2]]:
        yield from code.inputs.syntax
    yield from _empty_data_problems(config, code)
    yield from _prompt_problems(config, code)
    yield from _rate_problems(config)


def _port_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    wanted = [port for port in required_ports(config) if port not in facts.ports_in_use]
    for row in facts.runs:
        shared = [port for port in row.get("ports") or [] if port in wanted] if row["live"] else []
        if shared:
            yield Problem(
                f"{target}: the live run {row['run_id']} will use port {shared[0]}.",
                found=f"{row['run_id']}, {row['state']}, stage {row['stage']}; its engines' ports: {row['ports']}",
                needed=f"ports that no other run uses: {required_ports(config)}",
                fix="set another engine.sglang_port (0: free ones) or engine.router_port, or wait for that run: --wait",
            )


def _empty_data_problems(config: Config, code: Code) -> Iterator[Problem]:
    """Name data sets of which no row is left to read: the trainer ends at each of them."""
    read = {
        "sft_mixture": "sft" in config.stages,
        "rl_mixture": "rl" in config.stages and config.uses_engine,
    }
    for name in ("sft_mixture", "rl_mixture", "eval_mixture"):
        for spec, count in zip(
            getattr(config.data, name), code.inputs.rows.get(name, ()), strict=False
        ):
            if count.rows == 0 and read.get(name, True):
                yield Problem(
                    f"data.{name}: no row of {spec.name!r} is read.",
                    found=f"0 rows with start={spec.start}, stop={spec.stop}, step={spec.step}, "
                    f"max_samples={spec.max_samples}",
                    fix="put rows into it, correct that selection, or take it out of the mixture",
                )


def _prompt_problems(config: Config, code: Code) -> Iterator[Problem]:
    rl, rows = config.rl, mixture_rows(code, "rl_mixture")
    if rl is None or not config.uses_engine or not rows.count or rows.count >= rl.examples_per_step:
        return
    # A single prompt, taken over and over, is how one checks that a loop can learn at all: that is only said
    if rows.count != 1:
        yield Problem(
            f"rl.examples_per_step={rl.examples_per_step} is more than data.rl_mixture has.",
            found=f"{'' if rows.exact else 'at most '}{rows.count} prompts",
            needed="a step's prompts, each once",
            fix=f"set rl.examples_per_step to {rows.count} or less, or add prompts",
        )


def _rate_problems(config: Config) -> Iterator[Problem]:
    """Name learning rates that blow up weights which were drawn at random."""
    for name, stage in _random_stages(config):
        muon = stage.optimizer.kind == "muon"
        for field in RATES:
            rate = getattr(stage, field) * stage.init_lr_frac
            limit = MUON_RATE_PROBLEM if muon else RANDOM_RATE_PROBLEM
            if rate >= limit:
                yield Problem(
                    f"{name}.{field}={getattr(stage, field)} cannot be meant for random weights.",
                    found=f"model.init='random', {stage.optimizer.kind}, a rate of {rate:g} with "
                    f"init_lr_frac={stage.init_lr_frac}",
                    needed=f"less than {limit:g}: about 1e-3 for AdamW; 0.02 and 0.2 are for Muon",
                    fix="lower the rate, or set init_lr_frac",
                )


def _random_stages(config: Config) -> list[tuple[str, SFTConfig | RLConfig]]:
    """Return the stage that begins with random weights, if there is one."""
    first = config.stages[0] if config.stages else ""
    stage = getattr(config, first, None) if first else None
    random = (
        config.model.init == "random"
        and config.output.source_checkpoint is None
        and config.model.lora is None
    )
    return [(first, stage)] if stage is not None and random else []


# --- warnings -------------------------------------------------------------------------------------------------------


def plan_warnings(config: Config, code: Code) -> Iterator[str]:
    """Warn of what may be meant, and usually is not."""
    yield from code.warnings
    rl, rows = config.rl, mixture_rows(code, "rl_mixture")
    if rl is not None and config.uses_engine and rows.count == 1 < rl.examples_per_step:
        yield f"rl.examples_per_step={rl.examples_per_step}, and there is one prompt: each step takes it over and over"
    for name, stage in _random_stages(config):
        rates = {field: getattr(stage, field) * stage.init_lr_frac for field in RATES}
        if stage.optimizer.kind == "adamw" and max(rates.values()) < RANDOM_RATE_LOW:
            yield (
                f"{name}: the highest rate is {max(rates.values()):g}, and the weights are random: "
                "such rates are for pretrained weights, random ones hardly move (about 1e-3 is usual for small models)"
            )
        for field, rate in rates.items():
            if stage.optimizer.kind == "adamw" and RANDOM_RATE_HIGH <= rate < RANDOM_RATE_PROBLEM:
                yield f"{name}.{field}={rate:g} is high for AdamW on random weights: about 1e-3 is usual"
    random = [name for name, _ in _random_stages(config)]
    for name in config.stages if config.model.lora is None else ():
        for field, rate in _adamw_rates(getattr(config, name)).items():
            if name not in random and rate >= RANDOM_RATE_PROBLEM:
                yield f"{name}.{field}={rate:g} is very high for AdamW: each weight moves by about that in every step"
    if code.untracked_bytes > UNTRACKED_MB_LARGE * 1e6:
        yield (
            f"{len(code.untracked)} files that git does not track would be sent, {code.untracked_bytes / 1e6:.0f} MB: "
            f"{', '.join(code.untracked[:3])}{', …' if len(code.untracked) > 3 else ''} (git status shows them all; "
            "what is not needed belongs into .gitignore)"
        )


def _adamw_rates(stage: SFTConfig | RLConfig | None) -> dict[str, float]:
    if stage is None or stage.optimizer.kind != "adamw":
        return {}
    return {field: getattr(stage, field) * stage.init_lr_frac for field in RATES}


# --- in a researcher's words ----------------------------------------------------------------------------------------


def plan_summary(config: Config, code: Code) -> Iterator[str]:
    """Say what each stage reads, does and writes."""
    if config.sft is not None and "sft" in config.stages:
        yield _sft_words(config, config.sft, mixture_rows(code, "sft_mixture"))
    if config.rl is not None and "rl" in config.stages:
        yield _rl_words(config, config.rl, mixture_rows(code, "rl_mixture"))
    if config.data.eval_mixture:
        rows = mixture_rows(code, "eval_mixture")
        yield f"held out: {_rows_words(rows, 'rows')}"
        yield from (
            _answers_words(config, stage, rows)
            for stage in config.stages
            if answer_limits(config, stage)
        )
    yield _model_words(config, code.inputs.parameters)


def _rows_words(rows: Rows, what: str) -> str:
    if rows.count is None:
        return (
            f"{what} not counted (known for .jsonl files here, and folders of .jsonl or parquet files whose names, or "
            "whose README.md, tell their split)"
        )
    return f"{'' if rows.exact else 'at most '}{_count(rows.count, what.removesuffix('s'))}"


def _answers_words(config: Config, stage: Literal["sft", "rl"], rows: Rows) -> str:
    """Say what answering held-out rows without an engine may take."""
    limits = answer_limits(config, stage)
    assert limits is not None
    count = rows.count if limits.rows == -1 else limits.rows
    which = "all rows" if limits.rows == -1 else f"at most {limits.rows:,} rows"
    each = f"{1 + limits.samples} answers of" if limits.samples else "an answer of"
    total = "" if count is None else f", {limits.new_tokens_max(count):,} in all"
    return (
        f"{stage} answers in its own process, each time: {which}, {each} at most {limits.new_tokens:,} tokens to each"
        f"{total}; at most {limits.batch_rows} answers and {limits.batch_tokens:,} tokens at once"
    )


def _sft_words(config: Config, sft: SFTConfig, rows: Rows) -> str:
    per_step, length = sft.target_examples_per_step, config.data.max_length
    epochs = f" x {sft.num_epochs} epoch{'s' if sft.num_epochs > 1 else ''}"
    if sft.num_iterations != -1:
        steps = f"{_count(sft.num_iterations, 'step')} (sft.num_iterations)"
    elif rows.count is None:
        steps = f"rows{epochs} / {per_step} steps"
    else:
        whole = rows.count * sft.num_epochs // per_step
        steps = f"about {_count(max(1, whole), 'step')} (rows that are too long are left out)"
    return (
        f"sft: {_rows_words(rows, 'rows')}{epochs if sft.num_iterations == -1 else ''}, {per_step} a step"
        f" (at most {per_step * length:,} tokens): {steps}"
    )


def _rl_words(config: Config, rl: RLConfig, rows: Rows) -> str:
    if not config.uses_engine:
        return f"rl: the steps recorded in {rl.sampling.source} x {rl.num_epochs}"
    samples = rl.examples_per_step * rl.num_samples
    epochs = f" x {rl.num_epochs} epoch{'s' if rl.num_epochs > 1 else ''}"
    tokens = rl.agent.tokens_max if rl.agent is not None else rl.max_new_tokens
    a_step = f"{rl.examples_per_step} prompts x {rl.num_samples} samples a step (at most {samples * tokens:,} tokens)"
    if rows.count is None:
        return f"rl: {_rows_words(rows, 'prompts')}{epochs}, {a_step}: prompts{epochs} / {rl.examples_per_step} steps"
    steps = max(1, rows.count * rl.num_epochs // rl.examples_per_step)
    at_most = "" if rows.exact else "at most "
    left = rows.count * rl.num_epochs - steps * rl.examples_per_step
    rest = (
        f"; {_count(left, 'prompt')} at the end do not fill a step"
        if rows.exact and left > 0
        else ""
    )
    return (
        f"rl: {_rows_words(rows, 'prompts')}{epochs}, {a_step}: {at_most}{_count(steps, 'step')}, "
        f"{at_most}{_count(steps * samples, 'sample')}{rest}"
    )


def _model_words(config: Config, parameters: int | None) -> str:
    if parameters is None:
        return f"model: {config.model.name}; parameters not counted (known for a model whose files are here)"
    words = f"model: {_short(parameters)} parameters, weights {_bytes(parameters * BYTES_FLOAT32)} in float32"
    if config.model.lora is not None:
        return f"{words}; only adapters are trained"
    muon = any(
        getattr(config, stage).optimizer.kind == "muon"
        for stage in config.stages
        if getattr(config, stage)
    )
    at_most = "at most " if muon else ""
    ranks = config.target.world_size
    sharded = f", over {ranks} ranks" if config.target.sharding != "none" else " on each rank"
    return (
        f"{words}; with gradients and optimizer state {at_most}{_bytes(parameters * BYTES_FLOAT32 * 4)}{sharded}, "
        f"activations apart; a checkpoint takes {at_most}{_bytes(parameters * BYTES_FLOAT32 * 3)}"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
