"""What a run's stages read, from its config: data sets, held-out rows, and how many steps they make."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from rollouts.config import Config, DatasetSpec, RLConfig, SFTConfig
from rollouts.training.seams import Tokenizer

if TYPE_CHECKING:
    from rollouts.training.datasets.report import Report, SFTReport
    from rollouts.training.replay import ReplayRollouts
    from rollouts.training.types import Prompt, Sample

logger = logging.getLogger("rollouts.trainer")


@dataclass(frozen=True)
class Data:
    """All that the run's stages from this one on will read: a broken row stops the run before anything trains."""

    sft: Sequence["Sample"]
    sft_report: "SFTReport | None"  # None without an sft stage ahead
    reports: Sequence[tuple[str, "Report"]]  # (mixture, what was kept and left out of it), of all that is read
    prompts: Sequence["Prompt"]
    saved: "ReplayRollouts | None"  # in place of prompts and an engine
    eval_samples: Sequence["Sample"]
    eval_rows: Sequence["Prompt"]


def load_data(config: Config, tokenizer: Tokenizer, stage: str) -> Data:
    from rollouts.training.datasets.dataset_loaders import load_fitting_prompts, load_sft_mixture
    from rollouts.training.evaluation import mix_tasks
    from rollouts.training.replay import ReplayRollouts
    from rollouts.training.rewards import resolve

    data, left = config.data, config.stages[config.stages.index(stage) :]
    load_samples = partial(
        load_sft_mixture,
        tokenizer=tokenizer,
        max_length=data.max_length,
        seed=data.shuffle_seed,
        num_workers=_spare_cores(),
    )
    if "rl" in left and config.rl is not None:
        agent = config.rl.agent
        for path in (config.rl.reward_fn, config.rl.sampling.filter_fn, agent.environment if agent else None):
            if path is not None:
                resolve(path)
    saved = None
    if "rl" in left and config.rl is not None and not config.uses_engine:
        saved = ReplayRollouts(config.rl.sampling.source, temperature=config.rl.temperature)
    sft, report = load_samples(data.sft_mixture, seed=sft_seed(config)) if "sft" in left else ((), None)
    reports: list[tuple[str, Report]] = [] if report is None else [("sft_mixture", report)]
    fit: dict[str, Any] = {
        "seed": data.shuffle_seed,
        "tokenizer": tokenizer,
        "tokens_max": prompt_tokens_max(config, tokenizer),
    }
    if "rl" in left and config.rl is not None and config.rl.agent is not None:
        fit["tools"] = _episode_tools(config.rl.agent.environment)
    prompts: Sequence[Prompt] = ()
    if "rl" in left and saved is None:
        prompts, found = load_fitting_prompts(data.rl_mixture, **fit, row_problem=_row_problem(config))
        reports.append(("rl_mixture", found))
    eval_samples, eval_rows = [], []
    for spec in data.eval_mixture:
        if "sft" in left:
            samples, kept = load_samples([spec])
            eval_samples.append((task_name(spec), samples))
            reports.append((f"loss on {task_name(spec)}", kept))
        if spec.format != "text":  # plain text has a loss, but no answer
            rows, answered = load_fitting_prompts([spec], **fit)
            eval_rows.append((task_name(spec), rows))
            reports.append((f"answers to {task_name(spec)}", answered))
    return Data(
        sft=sft,
        sft_report=report,
        reports=reports,
        prompts=prompts,
        saved=saved,
        eval_samples=mix_tasks(eval_samples, seed=data.shuffle_seed),
        eval_rows=mix_tasks(eval_rows, seed=data.shuffle_seed),
    )


def prompt_tokens_max(config: Config, tokenizer: Tokenizer) -> int:
    """How long a prompt may be, so that an answer of rl.max_new_tokens fits behind it.

    Room is data.max_length, and where an engine samples no more than engine.context_length (of the embedded one, the
    model's positions too); an episode's first prompt also leaves room within rl.agent.tokens_max. Without RL nothing
    says how long an answer is: data.max_length.
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
    """How many positions the model has that lies beside the tokenizer; None where no config says it."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        model = AutoConfig.from_pretrained(tokenizer.name_or_path, **options)
    except (OSError, ValueError):  # loading the model says what is wrong
        return None
    return getattr(model.get_text_config(), "max_position_embeddings", None)


def require_fitting_model(model: Any, data: Data) -> None:
    """Raise DataError, before the first step, for rows that the model has no room for: see `ModelLimits`."""
    from rollouts.training.datasets.report import PromptReport
    from rollouts.training.model_limits import limits_of, require_fit

    require_fit(model, data.sft)
    require_fit(model, data.eval_samples)
    for name, report in data.reports:
        if isinstance(report, PromptReport):
            limits_of(model).require(report.largest_id, report.longest, f"a prompt of {name}")


def report_of(data: Data) -> str:
    """What became of the rows of each mixture, in one text: for the run's events."""
    shown = [(name, report) for name, report in data.reports if name == "sft_mixture" or report.noteworthy]
    return "; ".join(f"{name}: {report}" for name, report in shown)


def _row_problem(config: Config) -> "Callable[[Prompt], str | None] | None":
    """What the reward says of a row before anything is sampled; None where it says nothing."""
    from rollouts.training.rewards import resolve
    from rollouts.training.rewards.common import row_check_of

    reward = config.rl.reward_fn if config.rl is not None else None
    return row_check_of(resolve(reward)) if reward is not None else None


def _episode_tools(environment: str) -> Any:
    """What an agent's environment offers the model; nothing where it cannot say so before an episode starts."""
    from rollouts.training.rewards import resolve
    from rollouts.training.user_code import USER_ERRORS

    try:
        return resolve(environment)().tools() or None
    except USER_ERRORS as error:  # an episode that it ends says so
        logger.info("%s: cannot say its tools before an episode: %s", environment, error)
        return None


def _spare_cores() -> int:
    """This rank's share of the host's cores; 0 for one core, which has none to spare."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: no mask
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(share, 16) if share > 1 else 0


def task_name(spec: DatasetSpec) -> str:
    """What evaluation calls the rows of a data set that do not name their own task."""
    return spec.name if spec.subset is None else f"{spec.name}:{spec.subset}"


def sft_seed(config: Config) -> int | None:
    """Of the SFT mixture's order and of every epoch's; None for the order of the config file."""
    return None if config.data.sft_order == "sequence" else config.data.shuffle_seed


def sft_steps(config: Config, data: Data) -> int:
    sft = cast(SFTConfig, config.sft)
    if sft.num_iterations != -1:
        return sft.num_iterations
    return max(1, len(data.sft) * sft.num_epochs // sft.target_examples_per_step)


def rl_steps(config: Config, data: Data) -> int:
    rl = cast(RLConfig, config.rl)
    if data.saved is not None:
        return len(data.saved) * rl.num_epochs
    return max(1, len(data.prompts) * rl.num_epochs // rl.examples_per_step)
