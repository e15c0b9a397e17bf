"""Agents as a source of rollouts: a trajectory becomes a Sample, and episodes a `generate_fn`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.environment import Environment
from rollouts.agents.episode import Limits, Trajectory, run_episode
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.types import Prompt, Sample

_TURNS_APART = 1_000  # seeds of an episode's turns follow one another; episodes keep this distance


def trajectory_to_sample(trajectory: Trajectory) -> Sample:
    """All after the prompt is the response: what the policy sampled is trained on, what the environment said is not.

    `reward` is the sum of the turns'; a reward function may replace it. metadata: "messages", "turns", "turn_rewards",
    "finish_reason" ("stop", or "length" for an episode that a limit cut off), "ended" and "weight_version", the oldest.
    """
    last = next((m for m in reversed(trajectory.messages) if m["role"] == "assistant"), {"content": ""})
    versions = trajectory.weight_versions
    return Sample(
        prompt=trajectory.prompt,
        response=last["content"],
        tokens=trajectory.tokens,
        loss_mask=trajectory.mask,
        reward=sum(trajectory.turn_rewards),
        rollout_log_probs=trajectory.log_probs,
        metadata={
            "messages": trajectory.messages,
            "turns": len(trajectory.turn_rewards),
            "turn_rewards": trajectory.turn_rewards,
            "finish_reason": "stop" if trajectory.ended == "done" else "length",
            "ended": trajectory.ended,
            "weight_version": versions[0] if versions else None,
        },
        response_length=len(trajectory.tokens) - trajectory.prompt_length,
    )


def make_agent_generate_fn(
    endpoint: Endpoint, make_environment: Callable[[], Environment], *, limits: Limits | None = None
) -> Callable[..., Any]:
    """An async `generate_fn(prompts, *, seed)` for RolloutConfig: one episode per prompt, all at once, in order."""

    async def generate_fn(prompts: list[Prompt], *, seed: int) -> list[Sample]:
        episodes = [
            partial(run_episode, endpoint, make_environment(), prompt, seed=seed + index * _TURNS_APART, limits=limits)
            for index, prompt in enumerate(prompts)
        ]
        return [trajectory_to_sample(trajectory) for trajectory in await gather_in_order(episodes)]

    return generate_fn
