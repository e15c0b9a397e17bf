"""Episodes with a real, tiny policy: one that was taught to call the calculator, and one that babbles."""

from dataclasses import replace
from typing import Any

import anyio
import pytest
import torch

from rollouts import CalculatorEnvironment, Endpoint
from rollouts.agents.environment import AskAgain, Reply
from rollouts.agents.episode import AgentError, EpisodeLimits, between_turns, run_episode
from rollouts.training.agent_integration import make_agent_generate_fn, trajectory_to_sample
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rl_losses import sft_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.types import RolloutConfig
from tests.training.tiny_task import InProcessEngine, tiny_model, tiny_tokenizer

TEMPLATE = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
<|assistant|>{{ m.content }}
{%- for call in m.tool_calls or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor -%}
<|end|>{{ '\\n' }}
{%- elif m.role == 'tool' -%}
<|system|>{{ m.content }}<|end|>{{ '\\n' }}
{%- else -%}
<|user|>{{ m.content }}<|end|>{{ '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
QUESTION = "6*7?"
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
SPOKEN = f"<|user|>{QUESTION}<|end|>\n<|assistant|>{CALL}<|end|>\n<|system|>42<|end|>\n<|assistant|>42<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def taught(tokenizer: Any) -> InProcessEngine:
    """A policy that knows one conversation by heart."""
    model = tiny_model()
    ids = torch.tensor([tokenizer(SPOKEN)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sft_loss(model(input_ids=ids).logits, ids, torch.ones_like(ids, dtype=torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return InProcessEngine(model.eval(), tokenizer)


def endpoint(engine: Any, **changes: Any) -> Endpoint:
    options = {"max_new_tokens": 100, "temperature": 0.1, **changes}
    return Endpoint(engine=engine, tokenizer=engine.tokenizer, **options)


@pytest.mark.anyio
async def test_a_tool_is_called_and_its_answer_read(
    taught: InProcessEngine, tokenizer: Any
) -> None:
    """Goal: call, result, answer, token for token what the template makes of it; the tool's words are not trained on.

    Red with the tool's tokens in the mask, and with the new line after <|end|> lost between the turns.
    """
    episode = await run_episode(endpoint(taught), CalculatorEnvironment(), QUESTION, seed=0)
    assert episode.ended == "done" and len(episode.turn_rewards) == 2
    assert tokenizer.decode(episode.tokens) == SPOKEN
    trained = [token for token, mask in zip(episode.tokens, episode.mask, strict=True) if mask]
    assert tokenizer.decode(trained) == f"{CALL}<|end|>42<|end|>"
    assert [message["role"] for message in episode.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert episode.messages[2]["content"] == "42"


@pytest.mark.anyio
async def test_log_probs_are_those_of_one_forward_pass(taught: InProcessEngine) -> None:
    """Goal: every sampled token keeps the sampler's log-prob at its place, turns later too; others have 0.

    Red with the environment's tokens left out of the log-probs.
    """
    temperature = 0.7
    sample = trajectory_to_sample(
        await run_episode(
            endpoint(taught, temperature=temperature), CalculatorEnvironment(), QUESTION, seed=3
        )
    )
    start = len(sample.tokens) - sample.response_length
    with torch.no_grad():
        logits_TV = (
            taught.model(input_ids=torch.tensor([sample.tokens])).logits[0].float() / temperature
        )
    log_probs_TV = logits_TV.log_softmax(-1)
    for t in range(start, len(sample.tokens)):
        expected = float(log_probs_TV[t - 1, sample.tokens[t]]) if sample.loss_mask[t] else 0.0
        assert sample.rollout_log_probs[t - start] == pytest.approx(expected, abs=1e-4)
    assert sample.loss_mask[:start] == [0.0] * start


@pytest.mark.anyio
async def test_limits_end_an_episode_and_are_named(taught: InProcessEngine) -> None:
    """Goal: each limit keeps what there is and says which it was. Red with the turn's own bound ignored."""

    async def ended(limits: EpisodeLimits, **changes: Any) -> tuple[str, int, str]:
        episode = await run_episode(
            endpoint(taught, **changes), CalculatorEnvironment(), QUESTION, seed=0, limits=limits
        )
        sample = trajectory_to_sample(episode)
        return episode.ended, len(episode.tokens), sample.metadata["finish_reason"]

    opening = len(taught.tokenizer(SPOKEN[: SPOKEN.index("<tool_call>")])["input_ids"])
    assert (await ended(EpisodeLimits(turns_max=1)))[::2] == ("turns", "length")
    assert await ended(EpisodeLimits(), max_new_tokens=10) == ("length", opening + 10, "length")
    assert await ended(EpisodeLimits(tokens_max=opening + 5)) == ("tokens", opening + 5, "length")
    assert await ended(EpisodeLimits(tokens_max=opening)) == ("tokens", opening, "length")


@pytest.mark.anyio
async def test_a_long_answer_of_the_environment_does_not_exceed_the_limit(
    taught: InProcessEngine,
) -> None:
    """Goal: no sample is longer than tokens_max, whatever a tool returns: the trainer has no room for more, and no turn
    follows it. What was said stays in the messages. Red: a page of 5,000 tokens was in the sample."""

    class Page(CalculatorEnvironment):
        async def respond(self, message: dict[str, Any]) -> Reply:
            return Reply([{"role": "tool", "content": "x" * 5000}], done=False, reward=0.25)

    limits = EpisodeLimits(tokens_max=200)
    episode = await run_episode(endpoint(taught), Page(), QUESTION, seed=0, limits=limits)
    sample = trajectory_to_sample(episode)
    assert episode.ended == "tokens" and len(sample.tokens) <= 200 and sum(sample.loss_mask) > 0
    assert taught.tokenizer.decode(sample.tokens).endswith(f"{CALL}<|end|>")
    assert sample.reward == 0.25 and episode.messages[-1]["content"] == "x" * 5000


@pytest.mark.anyio
async def test_asking_again() -> None:
    """Goal: right at once earns 1, each wrong answer before it halves that; a row without an answer is an error, not
    an episode that nobody can win. Red with the worth kept, and without the check."""
    environment, question = AskAgain(), {"role": "user", "content": "ab"}
    assert await environment.start({"messages": [question], "answer": "ba"}) == [question]
    wrong, right = ({"role": "assistant", "content": said} for said in ("ab", " ba"))
    assert await environment.respond(wrong) == Reply([question], done=False)
    assert await environment.respond(right) == Reply([], done=True, reward=0.5)
    with pytest.raises(ValueError, match="has no 'answer'"):
        await AskAgain().start({"messages": [question]})


@pytest.mark.anyio
async def test_a_slow_environment_is_cut_off(
    taught: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the time limit ends the episode with the turns there are. Red without the limit: it would wait for ever."""
    limits: list[anyio.CancelScope] = []

    def noted(seconds: float) -> anyio.CancelScope:
        limits.append(anyio.CancelScope(deadline=anyio.current_time() + seconds))
        return limits[-1]

    class Slow(CalculatorEnvironment):
        async def respond(self, message: dict[str, Any]) -> Reply:
            limits[
                0
            ].deadline = anyio.current_time()  # the time is over: a turn takes what it takes
            await anyio.sleep_forever()
            raise AssertionError

    monkeypatch.setattr(anyio, "move_on_after", noted)
    with anyio.fail_after(100):
        episode = await run_episode(
            endpoint(taught), Slow(), QUESTION, seed=0, limits=EpisodeLimits(timeout_s=90.0)
        )
    assert episode.ended == "timeout" and sum(episode.mask) > 0


@pytest.mark.anyio
async def test_broken_and_impossible_calls_are_answered(tokenizer: Any) -> None:
    """Goal: the model is told what is wrong and goes on. Red with an unreadable call taken for a final answer."""
    said = [
        '<tool_call>{"name": </tool_call>',
        '<tool_call>{"name": "browser", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "calculator", "arguments": {"expression": "import os"}}</tool_call>',
        "I give up.",
    ]
    environment = CalculatorEnvironment()

    class Reciting(InProcessEngine):
        async def generate_batch(self, prompts, sampling_params, *, n=1, return_logprob=True):
            [[generation]] = await super().generate_batch(
                prompts, [{**sampling_params[0], "max_new_tokens": 1}], n=n
            )
            ids = [*tokenizer(said[len(self.requests) - 1])["input_ids"], tokenizer.eos_token_id]
            return [
                [
                    replace(
                        generation, output_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop"
                    )
                ]
            ]

    episode = await run_episode(
        endpoint(Reciting(tiny_model(), tokenizer)), environment, "?", seed=0
    )
    answers = [message["content"] for message in episode.messages if message["role"] == "tool"]
    assert episode.ended == "done" and len(answers) == 3
    assert answers[0].startswith("error: the tool call is not JSON")
    assert answers[1] == "error: no tool 'browser'; there is calculator"
    assert answers[2].startswith("error: cannot work out 'import os'")


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    """Goal: tokens that would not be what the policy saw are an error. Red without the comparison of the beginnings."""
    rewriting = tiny_tokenizer(
        TEMPLATE.replace("{{ m.content }}\n", "{{ m.content if loop.last else '' }}\n", 1)
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answers = [{"role": "tool", "content": "c"}]
    assert (
        tokenizer.decode(between_turns(tokenizer, messages, answers, None))
        == "\n<|system|>c<|end|>\n<|assistant|>"
    )
    with pytest.raises(AgentError, match="renders earlier turns differently"):
        between_turns(rewriting, messages, answers, None)


@pytest.mark.anyio
async def test_episodes_are_rollouts(taught: InProcessEngine, tokenizer: Any) -> None:
    """Goal: the manager takes episodes as groups, with rewards of the environment's own, and repeats them exactly.

    Red with one seed for all episodes of a group at this temperature.
    """

    class Rewarding(CalculatorEnvironment):
        async def respond(self, message: dict[str, Any]) -> Reply:
            reply = await super().respond(message)
            return Reply(reply.messages, reply.done, reward=0.5 if reply.messages else 1.0)

    async def batch() -> Any:
        generate_fn = make_agent_generate_fn(
            endpoint(taught, temperature=1.5), Rewarding, limits=EpisodeLimits(turns_max=2)
        )
        config = RolloutConfig(batch_size=2, n_samples_per_prompt=3, generate_fn=generate_fn)
        async with AsyncRolloutManager(DataBuffer([QUESTION, "1+1?"], seed=0), config) as manager:
            return await manager.generate_batch()

    first, second = await batch(), await batch()
    assert first.tokens == second.tokens and first.rewards == second.rewards
    assert len({tuple(tokens) for tokens in first.tokens}) > 2
    assert first.rewards == [sum(sample.metadata["turn_rewards"]) for sample in first.samples]
    assert all(len(sample.rollout_log_probs) == sample.response_length for sample in first.samples)


@pytest.mark.anyio
async def test_every_span_of_tokens_knows_its_weights(taught: InProcessEngine) -> None:
    """Goal: versions by response token, neighbours of one version joined, also where they change within a turn.

    Red with spans that count from the turn's own beginning.
    """

    class Changing(InProcessEngine):
        """Version 4 from the last token of the first turn on."""

        async def generate_batch(self, *arguments: Any, **options: Any) -> Any:
            [[generation]] = await super().generate_batch(*arguments, **options)
            end, first = len(generation.output_ids), len(self.requests) == 1
            spans = [("3", 0, end - 1), ("4", end - 1, end)] if first else [("4", 0, end)]
            versions = [{"version": v, "start": a, "end": b} for v, a, b in spans]
            return [[replace(generation, weight_version="4", weight_versions=versions)]]

    changing = Changing(taught.model, taught.tokenizer)
    episode = await run_episode(endpoint(changing), CalculatorEnvironment(), QUESTION, seed=0)
    sample = trajectory_to_sample(episode)
    call_length = len(taught.tokenizer(f"{CALL}<|end|>")["input_ids"])
    assert sample.metadata["weight_version"] == "4" and sample.metadata["turns"] == 2
    assert sample.metadata["weight_versions"] == [
        {"version": "3", "start": 0, "end": call_length - 1},
        {"version": "4", "start": call_length - 1, "end": sample.response_length},
    ]
    same = trajectory_to_sample(
        await run_episode(endpoint(taught), CalculatorEnvironment(), QUESTION, seed=0)
    )
    assert same.metadata["weight_version"] == "3" and "weight_versions" not in same.metadata


@pytest.mark.anyio
async def test_a_message_that_the_template_leaves_out_is_an_error(taught: Any) -> None:
    """Goal: an episode does not begin without its system message in silence. Red: the policy never saw it."""

    class Briefed(CalculatorEnvironment):
        async def start(self, prompt: Any) -> list[dict[str, Any]]:
            return [{"role": "system", "content": "be brief"}, *await super().start(prompt)]

    assistant = "if m.role == 'assistant' -%}"
    deaf = tiny_tokenizer(
        TEMPLATE.replace(assistant, "if m.role == 'system' -%}{%- el" + assistant, 1)
    )
    with pytest.raises(
        AgentError, match=r"the chat template leaves out content of the system: .*be brief"
    ):
        await run_episode(replace(endpoint(taught), tokenizer=deaf), Briefed(), QUESTION, seed=0)


@pytest.mark.anyio
@pytest.mark.parametrize(("answer", "said"), [(72.0, "72"), (["x", 72], "72"), ("72", " 72\n")])
async def test_a_second_try_accepts_what_rewards_accept(answer: Any, said: str) -> None:
    """Goal: numbers and lists of answers, as in rewards. Red: str(72.0) was never said."""
    environment = AskAgain()
    await environment.start({"messages": [{"role": "user", "content": "q"}], "answer": answer})
    assert (await environment.respond({"role": "assistant", "content": "7"})).done is False
    assert (await environment.respond({"role": "assistant", "content": said})).done is True
