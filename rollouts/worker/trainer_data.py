"""What a run's stages read, from its config: data sets, held-out rows, and how many steps they make."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from base_config import Config, DatasetSpec, RLConfig, SFTConfig

if TYPE_CHECKING:
    from rollouts.training.datasets.sft import SFTReport
    from rollouts.training.replay import ReplayRollouts
    from rollouts.training.types import Prompt, Sample

logger = logging.getLogger("rollouts.trainer")


@dataclass(frozen=True)
class Data:
    """All that the run's stages from this one on will read: a broken row stops the run before anything trains."""

    sft: Sequence["Sample"]
    sft_report: "SFTReport | None"  # None without an sft stage ahead
    prompts: Sequence["Prompt"]
    saved: "ReplayRollouts | None"  # in place of prompts and an engine
    eval_samples: Sequence["Sample"]
    eval_rows: Sequence["Prompt"]


def load_data(config: Config, tokenizer: Any, stage: str) -> Data:
    from rollouts.training.datasets.dataset_loaders import load_prompt_mixture, load_sft_mixture
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
        for path in (config.rl.reward_fn, config.rl.filter_fn, agent.environment if agent else None):
            if path is not None:
                resolve(path)
    saved = None
    if "rl" in left and config.rl is not None and not config.uses_engine:
        saved = ReplayRollouts(config.rl.source, temperature=config.rl.temperature)
    sft, report = load_samples(data.sft_mixture, seed=sft_seed(config)) if "sft" in left else ((), None)
    asked = [spec for spec in data.eval_mixture if spec.format != "text"]  # plain text has a loss, but no answer
    return Data(
        sft=sft,
        sft_report=report,
        prompts=load_prompt_mixture(data.rl_mixture, seed=data.shuffle_seed) if "rl" in left and saved is None else (),
        saved=saved,
        eval_samples=mix_tasks(
            [(task_name(spec), load_samples([spec])[0]) for spec in data.eval_mixture if "sft" in left],
            seed=data.shuffle_seed,
        ),
        eval_rows=mix_tasks(
            [(task_name(spec), load_prompt_mixture([spec], seed=data.shuffle_seed)) for spec in asked],
            seed=data.shuffle_seed,
        ),
    )


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
