"""An episode: the policy speaks, the environment answers, until one of them ends it or a limit does. Token-exact.

The tokens of a turn are the engine's own and are never encoded again; what the environment says is encoded as what the
chat template adds after the assistant's turn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.environment import Environment, Message, Reply
from rollouts.agents.tool_calls import parse_message
from rollouts.training.datasets.chat import render_prompt
from rollouts.training.datasets.lost_text import LostTool
from rollouts.training.datasets.rows import DataError
from rollouts.training.datasets.turn_end import TurnEnds
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt
from rollouts.training.user_code import USER_ERRORS, describe


class AgentError(RuntimeError):
    """An episode that must not be trained on, or a chat template that cannot be continued turn by turn."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an episode is cut off; it then counts as truncated, and keeps what there is."""

    turns_max: int = 8
    tokens_max: int = 4096  # of the whole episode, prompt included
    timeout_s: float = 600.0


@dataclass
class Trajectory:
    """What happened. `tokens` and `mask` (1.0: sampled) have one entry per token, prompt first; `log_probs` too, from
    the end of the prompt on, 0.0 for what was not sampled."""

    prompt: Prompt
    prompt_length: int
    tokens: list[int]
    mask: list[float]
    log_probs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    weight_versions: list[dict[str, Any]] = field(default_factory=list)  # [{version, start, end}] after the prompt
    turns: int = 0  # of the policy
    ended: str = ""  # "done", or which limit: "turns", "tokens", "length" (of a turn), "timeout"

    def add(self, tokens: list[int], log_probs: list[float] | None = None) -> None:
        """Sampled tokens with their log-probs, or the environment's without."""
        self.tokens += tokens
        self.mask += [0.0 if log_probs is None else 1.0] * len(tokens)
        self.log_probs += [0.0] * len(tokens) if log_probs is None else log_probs


async def run_episode(
    endpoint: Endpoint, environment: Environment, prompt: Prompt, *, seed: int, limits: Limits | None = None
) -> Trajectory:
    """One episode of `environment` from `prompt`. A turn's seed is a function of `seed` and its number.

    A call that cannot be read is answered with what is wrong with it, for the model to do better. What is under way
    when the time is up, a request or the environment's `respond`, is cancelled. Raises AgentError for what the
    environment raises, naming it and the prompt, for one that does not start in time, and for an aborted answer.
    """
    limits = limits or Limits()
    episode = None
    with anyio.move_on_after(limits.timeout_s) as scope:
        with _blamed_on(environment, "start", prompt):
            messages = await environment.start(prompt)
        with _blamed_on(environment, "tools", prompt):
            tools = environment.tools() or None
        opening = _opening(endpoint.tokenizer, messages, tools)
        episode = Trajectory(prompt, len(opening), list(opening), [0.0] * len(opening), messages=list(messages))
        for turn in range(limits.turns_max):
            episode.ended = await _turn(endpoint, environment, episode, tools, limits, seed + turn)
            if episode.ended:
                return episode
        episode.ended = "turns"
    if episode is None:
        raise AgentError(
            f"{type(environment).__name__}.start() took more than {limits.timeout_s:g} s, the episode's limit, "
            f"for prompt {str(prompt)[:200]}"
        )
    if scope.cancelled_caught:
        episode.ended = "timeout"
    return episode


@contextmanager
def _blamed_on(environment: Environment, method: str, prompt: Prompt) -> Iterator[None]:
    """What a user's environment raises becomes an AgentError that says where, and for which prompt."""
    try:
        yield
    except USER_ERRORS as error:
        raise AgentError(
            f"{type(environment).__name__}.{method}() raised {describe(error)} for prompt {str(prompt)[:200]}"
        ) from error


async def _turn(  # noqa: PLR0917 — the parts of an episode, passed on
    endpoint: Endpoint,
    environment: Environment,
    episode: Trajectory,
    tools: list[dict[str, Any]] | None,
    limits: Limits,
    seed: int,
) -> str:
    """The assistant's turn and the answer to it; why the episode ended, or "" while it goes on."""
    room = limits.tokens_max - len(episode.tokens)
    if room <= 0:
        return "tokens"
    generation = await endpoint.sample(episode.tokens, seed=seed, max_new_tokens=min(room, endpoint.max_new_tokens))
    output = list(generation.output_ids)
    if generation.finish_reason == "abort" or len(generation.logprobs or ()) != len(output):
        raise AgentError(f"{endpoint.client}: turn {episode.turns} came back incomplete: {generation}")
    episode.weight_versions += _spans(generation, len(episode.log_probs))
    episode.add(output, list(generation.logprobs))
    episode.turns += 1
    said = output[:-1] if output and output[-1] in endpoint.stops else output
    message, problems = parse_message(endpoint.tokenizer.decode(said), endpoint.tool_format)
    episode.messages.append(message)
    if generation.finish_reason == "length":
        episode.turn_rewards.append(0.0)
        return "tokens" if room <= endpoint.max_new_tokens else "length"
    if problems and "tool_calls" not in message:  # it meant to call, and does not know yet that it did not
        reply = Reply([], done=False)
    else:
        with _blamed_on(environment, "respond", episode.prompt):
            reply = await environment.respond(message)
    episode.turn_rewards.append(reply.reward)
    answers = [*reply.messages, *({"role": "tool", "content": problem} for problem in problems)]
    if reply.done:
        return "done"
    follows = between_turns(endpoint.tokenizer, episode.messages, answers, tools, ends=endpoint.turn_ends)
    episode.messages += answers
    if len(episode.tokens) + len(follows) >= limits.tokens_max:  # no turn can follow, so nobody reads them
        return "tokens"
    episode.add(follows)
    return ""


def _spans(generation: Any, start: int) -> list[dict[str, Any]]:
    """Which weights sampled which tokens of a turn that begins `start` tokens after the prompt."""
    whole = {"version": generation.weight_version, "start": 0, "end": len(generation.output_ids)}
    spans = getattr(generation, "weight_versions", None) or [whole]
    return [{**span, "start": start + span["start"], "end": start + span["end"]} for span in spans]


def between_turns(
    tokenizer: Tokenizer,
    messages: list[Message],
    answers: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    ends: TurnEnds | None = None,
) -> list[int]:
    """Tokens from after the end of the last of `messages`, an assistant's, to where the next turn of its begins.

    Raises AgentError where the template renders the turns before differently once `answers` follow.
    """
    before = _render(tokenizer, messages, tools)
    after = _render(tokenizer, [*messages, *answers], tools, add_generation_prompt=True)
    end = (ends or TurnEnds.of(tokenizer)).after_turn(before, 0, len(before))
    if end is None:
        raise AgentError("the chat template ends an assistant's turn without a special token: a turn cannot follow it")
    if after[:end] != before[:end]:
        raise AgentError("the chat template renders earlier turns differently once more follows: no exact continuation")
    return after[end:]


def _opening(tokenizer: Tokenizer, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
    """Tokens of the messages that an episode begins with. Raises AgentError for one that the template leaves out.

    A template without tools is no error here: the messages may describe them, or the policy know them.
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
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **options)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise AgentError(f"the chat template refuses these messages (roles {roles}): {error}") from error
