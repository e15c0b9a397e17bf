"""An episode: the policy speaks, the environment answers, until one of them ends it or a limit does. Token-exact.

The tokens of a turn are the engine's own and are never encoded again. The environment's messages are encoded as the
text that the chat template adds after the assistant's turn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import anyio

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.environment import Environment, Message, Reply
from rollouts.agents.tool_calls import parse_message
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import render_prompt
from rollouts.training.datasets.lost_text import LostTool
from rollouts.training.datasets.turn_end import TurnEnds
from rollouts.training.inference.http import Generation
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt
from rollouts.training.user_code import USER_ERRORS, describe


class AgentError(RuntimeError):
    """An episode that must not be trained on, or a chat template that cannot be continued turn by turn."""


class Ended(StrEnum):
    """Why an episode ended: by the environment, or at which limit."""

    DONE = "done"
    TURNS = "turns"
    TOKENS = "tokens"
    LENGTH = "length"  # of a turn
    TIMEOUT = "timeout"


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """When an episode is cut off; it then counts as truncated, and keeps the turns so far."""

    turns_max: int = 8
    tokens_max: int = 4096  # of the whole episode, prompt included
    timeout_s: float = 600.0


@dataclass
class Trajectory:
    """A played episode.

    `tokens` and `mask` (1.0: sampled) have one entry per token, prompt first. `log_probs` has one per token after the
    prompt, 0.0 for those that were not sampled.
    """

    prompt: Prompt
    prompt_length: int
    tokens: list[int]
    mask: list[float]
    log_probs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    # [{version, start, end}] after the prompt
    weight_versions: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0  # of the policy
    ended: Ended | None = None  # None: it goes on

    def add(self, tokens: list[int], log_probs: list[float] | None = None) -> None:
        """Append sampled tokens with their log-probs, or the environment's without."""
        self.tokens += tokens
        self.mask += [0.0 if log_probs is None else 1.0] * len(tokens)
        self.log_probs += [0.0] * len(tokens) if log_probs is None else log_probs


async def run_episode(
    endpoint: Endpoint,
    environment: Environment,
    prompt: Prompt,
    *,
    seed: int,
    limits: EpisodeLimits | None = None,
) -> Trajectory:
    """Play one episode of `environment` from `prompt`. A turn's seed is a function of `seed` and its number.

    A call that cannot be read is answered with its mistake, for the model to do better. When the time is up, the
    request or the environment's `respond` that is under way is cancelled. Raises AgentError for what the environment
    raises, naming it and the prompt, for one that does not start in time, and for an aborted answer.
    """
    limits = limits or EpisodeLimits()
    played: Trajectory | None = None
    with anyio.move_on_after(limits.timeout_s) as scope:
        with _blamed_on(environment, "start", prompt):
            messages = await environment.start(prompt)
        with _blamed_on(environment, "tools", prompt):
            tools = environment.tools() or None
        opening = _opening(endpoint.tokenizer, messages, tools)
        played = Trajectory(
            prompt, len(opening), list(opening), [0.0] * len(opening), messages=list(messages)
        )
        episode = _Episode(endpoint, environment, tools, limits, played)
        for turn in range(limits.turns_max):
            played.ended = await episode.turn(seed + turn)
            if played.ended is not None:
                return played
        played.ended = Ended.TURNS
    if played is None:
        raise AgentError(
            f"{type(environment).__name__}.start() took more than {limits.timeout_s:g} s, the episode's limit, "
            f"for prompt {str(prompt)[:200]}"
        )
    if scope.cancelled_caught:
        played.ended = Ended.TIMEOUT
    return played


@contextmanager
def _blamed_on(environment: Environment, method: str, prompt: Prompt) -> Iterator[None]:
    """Turn what a user's environment raises into an AgentError that names the method and the prompt."""
    try:
        yield
    except USER_ERRORS as error:
        raise AgentError(
            f"{type(environment).__name__}.{method}() raised {describe(error)} for prompt {str(prompt)[:200]}"
        ) from error


@dataclass(frozen=True)
class _Episode:
    """The parts of an episode that is being played."""

    endpoint: Endpoint
    environment: Environment
    tools: list[dict[str, Any]] | None
    limits: EpisodeLimits
    played: Trajectory

    async def turn(self, seed: int) -> Ended | None:
        """Sample the assistant's turn and add the answer to it. Return why the episode ended, or None."""
        played, endpoint = self.played, self.endpoint
        room = self.limits.tokens_max - len(played.tokens)
        if room <= 0:
            return Ended.TOKENS
        generation = await self._sample(seed, min(room, endpoint.max_new_tokens))
        said = generation.output_ids
        spoken = said[:-1] if said and said[-1] in endpoint.stops else said
        message, problems = parse_message(endpoint.tokenizer.decode(spoken), endpoint.tool_format)
        played.messages.append(message)
        if generation.finish_reason == "length":
            played.turn_rewards.append(0.0)
            return Ended.TOKENS if room <= endpoint.max_new_tokens else Ended.LENGTH
        # all of its calls are broken: tell it, before the environment
        if problems and "tool_calls" not in message:
            reply = Reply([], done=False)
        else:
            with _blamed_on(self.environment, "respond", played.prompt):
                reply = await self.environment.respond(message)
        played.turn_rewards.append(reply.reward)
        answers = [*reply.messages, *({"role": "tool", "content": problem} for problem in problems)]
        if reply.done:
            return Ended.DONE
        follows = between_turns(
            endpoint.tokenizer, played.messages, answers, self.tools, ends=endpoint.turn_ends
        )
        played.messages += answers
        # no turn can follow to read them
        if len(played.tokens) + len(follows) >= self.limits.tokens_max:
            return Ended.TOKENS
        played.add(follows)
        return None

    async def _sample(self, seed: int, max_new_tokens: int) -> Generation:
        """Sample one turn and add its tokens. Raises AgentError for an answer that is not complete."""
        played = self.played
        generation = await self.endpoint.sample(
            played.tokens, seed=seed, max_new_tokens=max_new_tokens
        )
        log_probs = list(generation.logprobs or ())
        if generation.finish_reason == "abort" or len(log_probs) != len(generation.output_ids):
            raise AgentError(
                f"{self.endpoint.client}: turn {played.turns} came back incomplete: {generation}"
            )
        played.weight_versions += _spans(generation, len(played.log_probs))
        played.add(list(generation.output_ids), log_probs)
        played.turns += 1
        return generation


def _spans(generation: Generation, start: int) -> list[dict[str, Any]]:
    """Return which weights sampled which tokens of a turn that begins `start` tokens after the prompt."""
    whole = {"version": generation.weight_version, "start": 0, "end": len(generation.output_ids)}
    spans = generation.weight_versions or [whole]
    return [{**span, "start": start + span["start"], "end": start + span["end"]} for span in spans]


def between_turns(
    tokenizer: Tokenizer,
    messages: list[Message],
    answers: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    ends: TurnEnds | None = None,
) -> list[int]:
    """Return the tokens between the end of the last of `messages`, an assistant's, and its next turn.

    Raises AgentError where the template renders the turns before differently once `answers` follow.
    """
    before = _render(tokenizer, messages, tools)
    after = _render(tokenizer, [*messages, *answers], tools, add_generation_prompt=True)
    end = (ends or TurnEnds.from_tokenizer(tokenizer)).after_turn(before, 0, len(before))
    if end is None:
        raise AgentError(
            "the chat template ends an assistant's turn without a special token: a turn cannot follow it"
        )
    if after[:end] != before[:end]:
        raise AgentError(
            "the chat template renders earlier turns differently once more follows: no exact continuation"
        )
    return after[end:]


def _opening(
    tokenizer: Tokenizer, messages: list[Message], tools: list[dict[str, Any]] | None
) -> list[int]:
    """Return the tokens of an episode's first messages. Raises AgentError for one that the template leaves out.

    A template without tools is accepted: the messages may describe them, or the policy know them.
    """
    try:
        return render_prompt(tokenizer, {"messages": messages, "tools": tools})
    except LostTool:
        return _render(tokenizer, messages, tools, add_generation_prompt=True)
    except DataError as error:
        raise AgentError(str(error)) from error


def _render(tokenizer: Tokenizer, messages: list[Message], tools: Any, **options: Any) -> list[int]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=False, **options
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise AgentError(
            f"the chat template refuses these messages (roles {roles}): {error}"
        ) from error
