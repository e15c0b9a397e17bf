"""What a run's stages read: data sets, held-out rows, saved rollouts, and how many steps they make."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import AutoConfig

from rollouts.config import Config, DatasetSpec, RLConfig, SFTConfig
from rollouts.data_formats import format_named
from rollouts.training.datasets.dataset_loaders import load_fitting_prompts, load_sft_mixture
from rollouts.training.datasets.prompts import OWN_TOOLS
from rollouts.training.datasets.report import MixtureReport, PromptReport, SFTReport
from rollouts.training.evaluation import mix_tasks
from rollouts.training.model_limits import limits_of, require_fit
from rollouts.training.replay import ReplayRollouts
from rollouts.training.rewards import resolve
from rollouts.training.rewards.reward_fn import row_check_of
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt, Sample
from rollouts.training.user_code import USER_ERRORS
from rollouts.worker.builders import StageName

logger = logging.getLogger("rollouts.trainer")


@dataclass(frozen=True)
class StageData:
    """All that the run's stages from this one on will read: a broken row stops the run before anything trains."""

    sft: Sequence[Sample]
    # (mixture, what was kept and left out of it), of all that is read
    reports: Sequence[tuple[str, MixtureReport]]
    prompts: Sequence[Prompt]
    saved: ReplayRollouts | None  # in place of prompts and an engine
    eval_samples: Sequence[Sample]
    eval_rows: Sequence[Prompt]


def load_data(config: Config, tokenizer: Tokenizer, stage: StageName) -> StageData:
    """Read what `stage` and the stages after it need. Raises DataError; RewardError for user code that is missing."""
    left = config.stages[config.stages.index(stage) :]
    rl = config.rl if "rl" in left else None
    if rl is not None:
        _require_user_code(rl)
    replays = rl is not None and not config.uses_engine
    saved = (
        ReplayRollouts(rl.sampling.source, temperature=rl.temperature)
        if rl is not None and replays
        else None
    )
    load_samples, load_rows = _loaders(config, tokenizer, rl)
    reports: list[tuple[str, MixtureReport]] = []
    sft: Sequence[Sample] = ()
    if "sft" in left:
        sft, report = load_samples(config.data.sft_mixture, seed=sft_seed(config))
        reports.append(("sft_mixture", report))
    prompts: Sequence[Prompt] = ()
    if "rl" in left and saved is None:
        prompts, found = load_rows(config.data.rl_mixture, row_problem=_row_problem(config))
        reports.append(("rl_mixture", found))
    eval_samples, eval_rows = [], []
    for spec in config.data.eval_mixture:
        if "sft" in left:
            samples, kept = load_samples([spec])
            eval_samples.append((task_name(spec), samples))
            reports.append((f"loss on {task_name(spec)}", kept))
        if format_named(spec.format).has_prompts:  # plain text has a loss, but no answer
            rows, answered = load_rows([spec])
            eval_rows.append((task_name(spec), rows))
            reports.append((f"answers to {task_name(spec)}", answered))
    return StageData(
        sft=sft,
        reports=reports,
        prompts=prompts,
        saved=saved,
        eval_samples=mix_tasks(eval_samples, seed=config.data.shuffle_seed),
        eval_rows=mix_tasks(eval_rows, seed=config.data.shuffle_seed),
    )


def _require_user_code(rl: RLConfig) -> None:
    """Raise RewardError, before anything trains, where a dotted path of the rl section names nothing."""
    for path in (rl.reward_fn, rl.sampling.filter_fn, rl.agent.environment if rl.agent else None):
        if path is not None:
            resolve(path)


def _loaders(
    config: Config, tokenizer: Tokenizer, rl: RLConfig | None
) -> tuple[
    Callable[..., tuple[list[Sample], SFTReport]],
    Callable[..., tuple[list[dict[str, Any]], PromptReport]],
]:
    """Return what loads SFT samples, and what loads prompt rows that an answer of `rl` fits behind."""
    data = config.data
    load_samples = partial(
        load_sft_mixture,
        tokenizer=tokenizer,
        max_length=data.max_length,
        seed=data.shuffle_seed,
        num_workers=_spare_cores(),
    )
    load_rows = partial(
        load_fitting_prompts,
        seed=data.shuffle_seed,
        tokenizer=tokenizer,
        tokens_max=prompt_tokens_max(config, tokenizer),
        tools=OWN_TOOLS if rl is None or rl.agent is None else _episode_tools(rl.agent.environment),
    )
    return load_samples, load_rows


def prompt_tokens_max(config: Config, tokenizer: Tokenizer) -> int:
    """Return how long a prompt may be, so that an answer of rl.max_new_tokens fits behind it.

    Room is data.max_length, and where an engine samples no more than engine.context_length (of the embedded one, the
    model's positions too); an episode's first prompt also leaves room within rl.agent.tokens_max. Without RL the limit
    is data.max_length: nothing says how long an answer is.
    """
    room, rl = config.data.max_length, config.rl
    if rl is None:
        return room
    if config.uses_engine and config.engine is not None:
        room = min(room, config.engine.context_length)
        if config.engine.kind == "embedded":
            room = min(room, _positions(tokenizer, config.model.trust_remote_code) or room)
    room -= rl.max_new_tokens
    return room if rl.agent is None else min(room, rl.agent.tokens_max - 1)


def _positions(tokenizer: Tokenizer, trust_remote_code: bool) -> int | None:
    """Return how many positions the model beside the tokenizer has; None where no config says it."""
    try:
        model = AutoConfig.from_pretrained(
            tokenizer.name_or_path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):  # loading the model says what is wrong
        return None
    return getattr(model.get_text_config(), "max_position_embeddings", None)


def require_fitting_model(model: nn.Module, data: StageData) -> None:
    """Raise DataError, before the first step, for rows that the model has no room for: see `ModelLimits`."""
    require_fit(model, data.sft)
    require_fit(model, data.eval_samples)
    for name, report in data.reports:
        if isinstance(report, PromptReport):
            limits_of(model).require(report.largest_id, report.longest, f"a prompt of {name}")


def report_of(data: StageData) -> str:
    """Return how many rows of each mixture were kept, and why others were left out: one text for the run's events."""
    shown = [
        (name, report)
        for name, report in data.reports
        if name == "sft_mixture" or report.noteworthy
    ]
    return "; ".join(f"{name}: {report}" for name, report in shown)


def _row_problem(config: Config) -> Callable[[Prompt], str | None] | None:
    """Return the reward's check of a row before anything is sampled; None where it has none."""
    reward = config.rl.reward_fn if config.rl is not None else None
    return row_check_of(resolve(reward)) if reward is not None else None


def _episode_tools(environment: str) -> Any:
    """Return the tools that an agent's environment offers; None where it cannot say so before an episode starts."""
    try:
        return resolve(environment)().tools() or None
    except USER_ERRORS as error:  # an episode that it ends says so
        logger.info("%s: cannot say its tools before an episode: %s", environment, error)
        return None


def _spare_cores() -> int:
    """Return this rank's share of the host's cores; 0 for one core, which leaves none to spare."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # macOS: no mask
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(share, 16) if share > 1 else 0


def task_name(spec: DatasetSpec) -> str:
    """Return what evaluation calls the rows of a data set that do not name their own task."""
    return spec.name if spec.subset is None else f"{spec.name}:{spec.subset}"


def sft_seed(config: Config) -> int | None:
    """Return the seed of the SFT mixture's order and of every epoch's; None for the order of the config file."""
    return None if config.data.sft_order == "sequence" else config.data.shuffle_seed


def sft_steps(sft: SFTConfig, data: StageData) -> int:
    """Return how many optimizer steps the sft stage makes."""
    if sft.num_iterations != -1:
        return sft.num_iterations
    return max(1, len(data.sft) * sft.num_epochs // sft.target_examples_per_step)


def rl_steps(rl: RLConfig, data: StageData) -> int:
    """Return how many batches of rollouts the rl stage trains on."""
    if data.saved is not None:
        return len(data.saved) * rl.num_epochs
    return max(1, len(data.prompts) * rl.num_epochs // rl.examples_per_step)
