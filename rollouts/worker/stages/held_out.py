"""Answers to held-out rows: through the stage's engines, or in the trainer's process within the config's limits."""

from collections.abc import Awaitable, Callable, Sequence

from rollouts.config import RLConfig
from rollouts.config.answer_limits import answer_limits
from rollouts.run_dir import append_event
from rollouts.training import distributed
from rollouts.training.agent_integration import evaluate_agent
from rollouts.training.evaluation import (
    ALL_TASKS,
    Evaluation,
    Sampling,
    evaluate_with_engine,
    evaluate_with_model,
)
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.types import Prompt, RewardFn
from rollouts.worker.builders.rollout_source import (
    agent_endpoints,
    agent_environment,
    episode_limits,
)
from rollouts.worker.stages.parts import StageParts


def rows_in_process(parts: StageParts, rows: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return those of `rows` that the trainer itself may answer; where they are fewer, an event says so."""
    limits = answer_limits(parts.config, parts.stage)
    answered = rows[:0] if limits is None else rows if limits.rows == -1 else rows[: limits.rows]
    if len(answered) < len(rows) and distributed.rank() == 0:
        count, limit = len(answered), parts.config.eval.in_process_rows
        message = f"{count} of {len(rows)} held-out rows are answered in the {parts.stage} stage"
        append_event(parts.run, "note", message=f"{message}: eval.in_process_rows={limit}")
    return answered


def answers_in_process(parts: StageParts, rows: Sequence[Prompt]) -> Evaluation:
    """Return the answers of the model in this process to `rows`. A sharded model needs every rank to call this."""
    limits = answer_limits(parts.config, parts.stage)
    assert parts.backend is not None and limits is not None, (
        "without engines there is a model in this process"
    )
    with parts.backend.computing():
        return evaluate_with_model(
            parts.backend.model,
            parts.tokenizer,
            rows,
            max_new_tokens=limits.new_tokens,
            batch_size=limits.batch_rows,
            batch_tokens=limits.batch_tokens,
            sampling=_sampling(parts),
        )


async def answers_of_engines(
    parts: StageParts,
    rl: RLConfig,
    rows: Sequence[Prompt],
    pool: EnginePool,
    reward_fn: RewardFn | None,
) -> Evaluation:
    """Return the engines' answers to `rows`; an agent's are episodes, judged by the job's own reward."""
    if rl.agent is None:
        return await evaluate_with_engine(
            pool, parts.tokenizer, rows, max_new_tokens=rl.max_new_tokens, sampling=_sampling(parts)
        )
    return await evaluate_agent(
        agent_endpoints(rl, rl.agent, parts.tokenizer, pool),
        agent_environment(rl.agent),
        rows,
        reward_fn=reward_fn,
        limits=episode_limits(rl.agent),
        sampling=_sampling(parts),
    )


def _sampling(parts: StageParts) -> Sampling | None:
    drawn = parts.config.eval
    return (
        Sampling(drawn.num_samples, drawn.temperature, drawn.top_k, drawn.seed)
        if drawn.num_samples
        else None
    )


def rl_evaluation(
    parts: StageParts,
    rl: RLConfig,
    held_out: Sequence[Prompt],
    pool: EnginePool,
    reward_fn: RewardFn | None,
) -> Callable[[int], Awaitable[dict[str, float]]] | None:
    """Return what evaluates a step of RL; None where no held-out row is to be answered."""
    config = parts.config
    trained_before = len(config.stages) > 1 or config.output.source_checkpoint is not None
    own = held_out if config.uses_engine else rows_in_process(parts, held_out)
    if not own:
        return None

    async def evaluate(step: int) -> dict[str, float]:
        """Return exact match and pass@k: before the first step and after the last over all rows."""
        whole = step in (0, parts.num_steps) or rl.eval_examples == -1
        rows = own if whole else own[: rl.eval_examples]
        if pool:
            found = await answers_of_engines(parts, rl, rows, pool, reward_fn)
        else:
            found = answers_in_process(parts, rows)
        by_task = found.metrics(config.eval.pass_at)
        stage = "rl" if step or trained_before else "base"
        parts.log.answers(stage, step, rows, found)
        parts.log.evaluation(stage, step, by_task)
        return by_task[ALL_TASKS]

    return evaluate
