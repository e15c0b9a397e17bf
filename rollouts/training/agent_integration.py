"""Agents as a source of rollouts: trajectories as Samples, episodes as a `generate_fn` and as an evaluation."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import anyio

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.environment import Environment
from rollouts.agents.episode import AgentError, Ended, EpisodeLimits, Trajectory, run_episode
from rollouts.training.evaluation import Evaluation, Sampling, task_of
from rollouts.training.rewards.reward_fn import finite_or_none, is_full
from rollouts.training.rollout_gen.async_rollout_manager import group_seed
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.rollout_gen.engine_generate import prompt_id
from rollouts.training.types import Prompt, RewardFn, Sample
from rollouts.training.user_code import USER_ERRORS, describe

_TURNS_APART = 1_000  # seeds of an episode's turns follow one another; episodes keep this distance


def trajectory_to_sample(trajectory: Trajectory) -> Sample:
    """Return the episode as a sample: all after the prompt is the response, of which sampled tokens are trained on.

    `reward` is the sum of the turns'; a reward function may replace it. metadata: "messages", "turns", "turn_rewards",
    "finish_reason" ("stop", or "length" for an episode that a limit cut off), "ended", "prompt_id", "weight_version"
    (the newest), and "weight_versions" [{version, start, end}] by response token where there was more than one.
    """
    last = next(
        (m for m in reversed(trajectory.messages) if m["role"] == "assistant"), {"content": ""}
    )
    spans = _joined(trajectory.weight_versions)
    return Sample(
        prompt=trajectory.prompt,
        response=last["content"],
        tokens=trajectory.tokens,
        loss_mask=trajectory.mask,
        reward=sum(trajectory.turn_rewards),
        rollout_log_probs=trajectory.log_probs,
        metadata={
            "messages": trajectory.messages,
            "turns": trajectory.turns,
            "turn_rewards": trajectory.turn_rewards,
            "finish_reason": "stop" if trajectory.ended == Ended.DONE else "length",
            "ended": str(trajectory.ended or ""),
            "prompt_id": prompt_id(trajectory.prompt),
            "weight_version": spans[-1]["version"] if spans else None,
            **({"weight_versions": spans} if len(spans) > 1 else {}),
        },
        response_length=len(trajectory.tokens) - trajectory.prompt_length,
    )


def _joined(spans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring spans of one version into one, from the first's beginning to the last's end."""
    joined: list[dict[str, Any]] = []
    for span in spans:
        if joined and joined[-1]["version"] == span["version"]:
            joined[-1] = {**joined[-1], "end": span["end"]}
        else:
            joined.append(dict(span))
    return joined


def make_agent_generate_fn(
    endpoint: Endpoint | Sequence[Endpoint],
    make_environment: Callable[[], Environment],
    *,
    limits: EpisodeLimits | None = None,
) -> Callable[..., Any]:
    """Return an async `generate_fn(prompts, *, seed)` for RolloutConfig: one episode per prompt, all at once, in order.

    Groups go to the endpoints in turn; an episode stays with one, which has its prefix in the cache.
    """
    endpoints = [endpoint] if isinstance(endpoint, Endpoint) else list(endpoint)
    if not endpoints:
        raise ValueError("make_agent_generate_fn: no endpoint; needs at least one")
    turns = itertools.cycle(endpoints)

    async def generate_fn(prompts: list[Prompt], *, seed: int) -> list[Sample]:
        chosen = next(turns)
        episodes = [
            partial(
                _episode,
                chosen,
                make_environment,
                prompt,
                seed=seed + index * _TURNS_APART,
                limits=limits,
            )
            for index, prompt in enumerate(prompts)
        ]
        return [trajectory_to_sample(trajectory) for trajectory in await gather_in_order(episodes)]

    return generate_fn


async def _episode(
    endpoint: Endpoint, make_environment: Callable[[], Environment], prompt: Prompt, **options: Any
) -> Trajectory:
    try:
        environment = make_environment()
    except USER_ERRORS as error:
        name = getattr(make_environment, "__name__", repr(make_environment))
        raise AgentError(
            f"{name}() raised {describe(error)} for prompt {str(prompt)[:200]}"
        ) from error
    return await run_episode(endpoint, environment, prompt, **options)


async def evaluate_agent(
    endpoint: Endpoint | Sequence[Endpoint],
    make_environment: Callable[[], Environment],
    rows: Sequence[Prompt],
    *,
    reward_fn: RewardFn | None = None,
    limits: EpisodeLimits | None = None,
    sampling: Sampling | None = None,
    episodes_at_once: int = 128,
) -> Evaluation:
    """Play held-out rows as episodes: a greedy one each, and `sampling.num_samples` sampled ones.

    The reward is `reward_fn`'s, plain or async, or without one the environment's; None (not scorable) counts as 0. An
    episode is right when its reward is 1.0. Raises ValueError for no rows, and what an episode raises.
    """
    if not rows:
        raise ValueError("evaluation: no rows; needs at least one")
    endpoints = [endpoint] if isinstance(endpoint, Endpoint) else list(endpoint)
    limiter = anyio.CapacityLimiter(episodes_at_once)

    async def reward(sampler: Sequence[Endpoint], place: int, seed: int) -> tuple[float, str]:
        chosen, row = sampler[place % len(sampler)], rows[place]
        async with limiter:
            sample = trajectory_to_sample(
                await _episode(chosen, make_environment, row, seed=seed, limits=limits)
            )
            value: Any = sample.reward if reward_fn is None else reward_fn(sample)
            if inspect.isawaitable(value):
                value = await value
        return finite_or_none(value, sample) or 0.0, sample.response

    greedily = [replace(one, temperature=0.0) for one in endpoints]
    calls = [partial(reward, greedily, place, 0) for place in range(len(rows))]
    n = sampling.num_samples if sampling else 0
    if sampling:
        drawn = [
            replace(one, temperature=sampling.temperature, top_k=sampling.top_k)
            for one in endpoints
        ]
        for place in range(len(rows)):
            first = group_seed(sampling.seed, place)
            calls += [
                partial(reward, drawn, place, first + index * _TURNS_APART) for index in range(n)
            ]
    played = await gather_in_order(calls)
    rewards = [value for value, _ in played]
    greedy, sampled = rewards[: len(rows)], rewards[len(rows) :]
    return Evaluation(
        tasks=[task_of(row) for row in rows],
        responses=[response for _, response in played[: len(rows)]],
        right=[is_full(one) for one in greedy],
        num_samples=n,
        num_right=[sum(map(is_full, sampled[row * n : (row + 1) * n])) for row in range(len(rows))],
        rewards=greedy,
    )
