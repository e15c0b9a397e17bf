"""What samples groups for the RL stage: single answers or an agent's episodes, scored and filtered."""

import inspect
from collections.abc import Callable, Sequence

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.environment import Environment
from rollouts.agents.episode import EpisodeLimits
from rollouts.config import AgentConfig, RLConfig
from rollouts.training.agent_integration import make_agent_generate_fn
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.replica_sampler import samplers
from rollouts.training.rewards import resolve
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.seams import Tokenizer
from rollouts.training.types import GenerateFn, Prompt, RewardFn, RolloutConfig


def build_rollout_manager(
    rl: RLConfig,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    pool: EnginePool,
    reward_fn: RewardFn | None,
) -> AsyncRolloutManager:
    """Return what makes a batch of groups for each step, out of the stage's prompts."""
    config = RolloutConfig(
        batch_size=rl.examples_per_step,
        n_samples_per_prompt=rl.num_samples,
        over_sampling_factor=rl.sampling.over_sampling_factor,
        generate_fn=build_generate_fn(rl, tokenizer, pool, reward_fn),
        reward_fn=reward_fn,
        filter_fn=resolve(rl.sampling.filter_fn) if rl.sampling.filter_fn else None,
        retries_max=rl.sampling.retries_max,
        seed=rl.sampling.seed,
    )
    return AsyncRolloutManager(DataBuffer(prompts, seed=rl.sampling.seed), config)


def build_generate_fn(
    rl: RLConfig, tokenizer: Tokenizer, pool: EnginePool, reward_fn: RewardFn | None
) -> GenerateFn:
    """Return the function that samples a group.

    Groups of one moment share a request, unless rewards wait for something, or updates find groups at different
    points: each group then returns by itself.
    """
    if rl.agent is not None:
        endpoints = agent_endpoints(rl, rl.agent, tokenizer, pool)
        return make_agent_generate_fn(
            endpoints, agent_environment(rl.agent), limits=episode_limits(rl.agent)
        )
    one_request_per_group = (
        rl.in_flight_updates
        or (rl.reward is not None and rl.reward.workers > 0)
        or inspect.iscoroutinefunction(reward_fn)
    )
    return make_generate_fn(
        pool,
        tokenizer,
        max_new_tokens=rl.max_new_tokens,
        temperature=rl.temperature,
        top_k=rl.top_k,
        one_request_per_group=one_request_per_group,
    )


def agent_endpoints(
    rl: RLConfig, agent: AgentConfig, tokenizer: Tokenizer, pool: EnginePool
) -> list[Endpoint]:
    """Return where an agent's policy answers: one endpoint per engine."""
    return [
        Endpoint(
            engine=sampler,
            tokenizer=tokenizer,
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
            top_k=rl.top_k,
            tool_format=agent.tool_format,
        )
        for sampler in samplers(pool)
    ]


def agent_environment(agent: AgentConfig) -> Callable[[], Environment]:
    """Return what makes an environment for each episode."""
    return resolve(agent.environment)


def episode_limits(agent: AgentConfig) -> EpisodeLimits:
    return EpisodeLimits(
        turns_max=agent.turns_max, tokens_max=agent.tokens_max, timeout_s=agent.timeout_s
    )
