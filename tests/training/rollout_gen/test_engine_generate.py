"""make_generate_fn: what the engine sampled is what the Sample holds."""

import dataclasses
from functools import partial
from typing import Any

import anyio
import pytest
import torch

from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.rollout_gen.engine_generate import (
    GenerationError,
    make_generate_fn,
    prompt_id,
)
from tests.training.tiny_task import InProcessEngine, tiny_model, tiny_tokenizer

ROW = {"messages": [{"role": "user", "content": "abc"}], "answer": "cba"}


@pytest.fixture(scope="module")
def engine() -> InProcessEngine:
    return InProcessEngine(tiny_model(), tiny_tokenizer())


def generate_fn(*engines: Any, **changes: Any) -> Any:
    options = {"max_new_tokens": 5, "temperature": 1.0, **changes}
    return make_generate_fn(engines, tiny_tokenizer(), **options)


@pytest.mark.anyio
async def test_samples_hold_the_engines_own_tokens_and_log_probs(engine: InProcessEngine) -> None:
    """Goal: trl#5224, never re-encode: an untrained model emits half characters that text would lose.

    Red when tokens were encoded from the text. Log-probs are checked against a forward pass of the whole sequence.
    """
    samples = await generate_fn(engine)([ROW] * 4, seed=11)
    prompt = tiny_tokenizer().apply_chat_template(
        ROW["messages"], add_generation_prompt=True, return_dict=False
    )
    for sample in samples:
        assert sample.tokens[: len(prompt)] == prompt and sample.prompt == ROW
        response = sample.tokens[len(prompt) :]
        assert sample.response_length == len(response)
        assert sample.loss_mask == [0.0] * len(prompt) + [1.0] * len(response)
        with torch.no_grad():
            logprobs_TV = (
                engine.model(input_ids=torch.tensor([sample.tokens]))
                .logits[0]
                .float()
                .log_softmax(-1)
            )
        expected = [
            float(logprobs_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(response)
        ]
        assert sample.rollout_log_probs == pytest.approx(expected, abs=1e-5)
        assert sample.metadata == {
            "weight_version": "3",
            "finish_reason": "stop" if response[-1] == 1 else "length",
            "prompt_id": prompt_id(ROW),
        }
    assert len({tuple(sample.tokens) for sample in samples}) > 1
    assert any(
        tiny_tokenizer()(s.response)["input_ids"] != s.tokens[len(prompt) :] for s in samples
    )


@pytest.mark.anyio
async def test_a_rounds_groups_go_together_and_engines_take_turns(engine: InProcessEngine) -> None:
    """Goal: groups asked for at once are one request an engine, each with its own seed, and its own samples come back
    to it. Red with a request per group, and with the answers handed out in reverse."""
    one, two = (dataclasses.replace(engine, requests=[]) for _ in range(2))
    generate = generate_fn(one, two, top_k=7, temperature=0.5, stop_token_ids=[1, 9])
    rows = [
        {"messages": [{"role": "user", "content": text}], "answer": ""}
        for text in ("ab", "cd", "ef", "gh")
    ]
    groups = await gather_in_order(
        [partial(generate, [row] * 3, seed=seed) for seed, row in enumerate(rows)]
    )
    assert [[sample.prompt for sample in group] for group in groups] == [[row] * 3 for row in rows]
    alone = [await generate([row] * 3, seed=seed) for seed, row in enumerate(rows)]
    assert [[sample.tokens for sample in group] for group in groups] == [
        [s.tokens for s in group] for group in alone
    ]
    assert [len(request["prompts"]) for request in one.requests] == [2, 1, 1]
    assert [request["n"] for request in two.requests] == [3, 3, 3]
    sent = [*one.requests[0]["sampling_params"], *two.requests[0]["sampling_params"]]
    # trio starts tasks in any order
    assert sorted(params["sampling_seed"] for params in sent) == [0, 1, 2, 3]
    for params in sent:
        assert {key: value for key, value in params.items() if key != "sampling_seed"} == {
            "temperature": 0.5,
            "top_k": 7,
            "max_new_tokens": 5,
            "stop_token_ids": [1, 9],
        }


@pytest.mark.anyio
async def test_a_failed_round_fails_every_group_and_the_next_one_is_sent(
    engine: InProcessEngine,
) -> None:
    """Goal: no group waits for ever when the request that carried it failed. Red without the release in `finally`."""

    class Failing(InProcessEngine):
        async def generate_batch(self, *arguments: Any, **keywords: Any) -> list[Any]:
            if not self.requests:
                self.requests.append({})
                raise ConnectionError("gone")
            return await super().generate_batch(*arguments, **keywords)

    generate = generate_fn(Failing(engine.model, engine.tokenizer))
    failures: list[Exception] = []

    async def try_one(seed: int) -> None:
        try:
            await generate([ROW], seed=seed)
        except (ConnectionError, GenerationError) as error:
            failures.append(error)

    with anyio.fail_after(100):
        await gather_in_order([partial(try_one, seed) for seed in range(3)])
        assert sorted(type(error).__name__ for error in failures) == [
            "ConnectionError",
            *["GenerationError"] * 2,
        ]
        assert len(await generate([ROW], seed=9)) == 1


@pytest.mark.anyio
async def test_the_end_token_is_trained() -> None:
    """Goal: verl#3562, stopping is learnt: the sampled end token is in tokens and mask. Red when it was cut off."""
    model = tiny_model()
    with torch.no_grad():  # an engine that always ends at once
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = model.model.norm.weight * 0 + 1.0
    engine = InProcessEngine(model, tiny_tokenizer())
    (sample,) = await generate_fn(engine, stop_token_ids=list(range(261)))([ROW], seed=0)
    assert sample.response_length == 1 and sample.loss_mask[-1] == 1.0
    assert sample.metadata["finish_reason"] == "stop"


@pytest.mark.anyio
async def test_an_answer_cut_off_from_outside_is_an_error(engine: InProcessEngine) -> None:
    """Goal: an abort says nothing about the policy and is never trained on. Red without the check."""

    class Aborting(InProcessEngine):
        async def generate_batch(self, *arguments: Any, **keywords: Any) -> list[Any]:
            (group,) = await super().generate_batch(*arguments, **keywords)
            detail = {"type": "abort", "message": "out of memory"}
            return [
                [dataclasses.replace(g, finish_reason="abort", finish_detail=detail) for g in group]
            ]

    with pytest.raises(GenerationError, match=r"aborted after [0-9]+ tokens: out of memory"):
        await generate_fn(Aborting(engine.model, engine.tokenizer))([ROW], seed=0)


@pytest.mark.anyio
async def test_too_few_answers_or_log_probs_are_an_error(engine: InProcessEngine) -> None:
    """Goal: a short group never becomes a batch. Red without the two checks."""

    class Short(InProcessEngine):
        async def generate_batch(self, *arguments: Any, **keywords: Any) -> list[Any]:
            return [group[:1] for group in await super().generate_batch(*arguments, **keywords)]

    class Silent(InProcessEngine):
        async def generate_batch(self, *arguments: Any, **keywords: Any) -> list[Any]:
            return await super().generate_batch(*arguments, **{**keywords, "return_logprob": False})

    with pytest.raises(GenerationError, match="1 generations for n=2"):
        await generate_fn(Short(engine.model, engine.tokenizer))([ROW] * 2, seed=0)
    with pytest.raises(GenerationError, match="0 log-probs for"):
        await generate_fn(Silent(engine.model, engine.tokenizer))([ROW], seed=0)


def test_nothing_to_stop_at_or_no_engine_is_an_error(engine: InProcessEngine) -> None:
    """Goal: at construction, not after an hour of endless answers. Red without the checks."""
    with pytest.raises(ValueError, match="engines is empty"):
        generate_fn()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token; give stop_token_ids"):
        make_generate_fn([engine], tokenizer, max_new_tokens=5, temperature=1.0)


@pytest.mark.anyio
async def test_groups_asked_for_apart_come_back_by_themselves(engine: InProcessEngine) -> None:
    """Goal: one group's reward need not wait for another's last token: a request a group, with the same samples. Red
    with the option not looked at."""
    alone, shared = (dataclasses.replace(engine, requests=[]) for _ in range(2))
    found = []
    for target, apart in ((alone, True), (shared, False)):
        generate = generate_fn(target, one_request_per_group=apart)
        groups = await gather_in_order(
            [partial(generate, [ROW] * 2, seed=seed) for seed in range(3)]
        )
        found.append([[sample.tokens for sample in group] for group in groups])
    assert found[0] == found[1]
    assert [len(request["prompts"]) for request in alone.requests] == [1, 1, 1]
    assert [len(request["prompts"]) for request in shared.requests] == [3]
