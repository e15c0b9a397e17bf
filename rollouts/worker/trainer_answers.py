"""How a stage answers held-out rows: through its engines, or in its own process within the config's limits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from rollouts.config import RLConfig
from rollouts.config.answers import answer_limits
from rollouts.run_dir import append_event
from rollouts.worker.trainer_data import Data
from rollouts.worker.trainer_job import Job, rank
from rollouts.worker.trainer_wiring import agent_parts

if TYPE_CHECKING:
    from rollouts.training.evaluation import Evaluation
    from rollouts.training.types import Prompt
    from rollouts.training.weight_sync import SGLangEngine


def rows_in_process(job: Job, rows: Sequence["Prompt"]) -> Sequence["Prompt"]:
    """Return those of `rows` that the trainer itself may answer; where they are fewer, an event says so."""
    limits = answer_limits(job.config, cast(Literal["sft", "rl"], job.stage))
    answered = rows[:0] if limits is None else rows if limits.rows == -1 else rows[: limits.rows]
    if len(answered) < len(rows) and rank() == 0:
        count, limit = len(answered), job.config.eval.in_process_rows
        message = f"{count} of {len(rows)} held-out rows are answered in the {job.stage} stage"
        append_event(job.run, "note", message=f"{message}: eval.in_process_rows={limit}")
    return answered


async def answers(
    job: Job, rows: Sequence["Prompt"], engines: Sequence["SGLangEngine"] | None, reward_fn: Any = None
) -> "Evaluation":
    """The model's answers to held-out rows: through the engines, or in process where there are none.

    An agent's are episodes, judged by the job's own reward, where there are engines.
    """
    from rollouts.training.agent_integration import evaluate_agent
    from rollouts.training.evaluation import Sampling, evaluate_with_engine, evaluate_with_model

    config = job.config
    drawn = config.eval
    sampling = Sampling(drawn.num_samples, drawn.temperature, drawn.top_k, drawn.seed) if drawn.num_samples else None
    if engines:
        rl = cast(RLConfig, config.rl)
        if rl.agent:
            endpoints, environment, limits = agent_parts(rl, job.tokenizer, engines)
            return await evaluate_agent(
                endpoints, environment, rows, reward_fn=reward_fn, limits=limits, sampling=sampling
            )
        return await evaluate_with_engine(
            engines, job.tokenizer, rows, max_new_tokens=rl.max_new_tokens, sampling=sampling
        )
    own = answer_limits(config, cast(Literal["sft", "rl"], job.stage))
    assert job.backend is not None and own is not None, "without engines there is a model in this process"
    with job.backend.computing():
        return evaluate_with_model(
            job.backend.model,
            job.tokenizer,
            rows,
            max_new_tokens=own.new_tokens,
            batch_size=own.batch_rows,
            batch_tokens=own.batch_tokens,
            sampling=sampling,
        )


def rl_evaluation(job: Job, data: Data, engines: Sequence["SGLangEngine"], reward_fn: Any) -> Any:
    """Return what evaluates a step of RL; None where no held-out row is to be answered."""
    from rollouts.training.evaluation import ALL_TASKS

    rl = cast(RLConfig, job.config.rl)
    trained_before = len(job.config.stages) > 1 or job.config.output.source_checkpoint is not None
    own = data.eval_rows if job.config.uses_engine else rows_in_process(job, data.eval_rows)
    if not own:
        return None

    async def evaluate(step: int) -> dict[str, float]:
        """Exact match and pass@k: over all rows before the first step and after the last, else rl.eval_examples."""
        whole = step in (0, job.num_steps) or rl.eval_examples == -1
        rows = own if whole else own[: rl.eval_examples]
        found = await answers(job, rows, engines, reward_fn)
        by_task = found.metrics(job.config.eval.pass_at)
        stage = "rl" if step or trained_before else "base"
        job.log_answers(stage, step, rows, found)
        job.log_eval(stage, step, by_task)
        return by_task[ALL_TASKS]

    return evaluate
