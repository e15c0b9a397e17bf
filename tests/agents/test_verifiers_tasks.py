"""The adapter against the real verifiers library; skipped where it is not installed.

The library takes seconds to import, so only its tests do, not the collection of all others.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.episode import Trajectory, run_episode
from rollouts.agents.verifiers_tasks import VerifiersError
from rollouts.training.datasets.dataset_loaders import load_prompts_from_jsonl
from rollouts.training.rewards import resolve
from tests.agents.test_episode import TEMPLATE
from tests.training.tiny_task import InProcessEngine, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("verifiers") is None, reason="verifiers is not installed"
    ),
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),  # the library's own
]


class Reciting(InProcessEngine):
    """Says what it is told to, turn by turn."""

    def __init__(self, *said: str) -> None:
        super().__init__(tiny_model(), tiny_tokenizer(TEMPLATE))
        self.said = list(said)

    async def generate_batch(self, prompts: Any, sampling_params: Any, **options: Any) -> Any:
        [[generation]] = await super().generate_batch(
            prompts, [{**sampling_params[0], "max_new_tokens": 1}]
        )
        ids = [*self.tokenizer(self.said.pop(0))["input_ids"], self.tokenizer.eos_token_id]
        return [
            [replace(generation, output_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop")]
        ]


def call(**arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': 'add', 'arguments': arguments})}</tool_call>"


async def play(*said: str, index: int = 0) -> Trajectory:
    engine = Reciting(*said)
    endpoint = Endpoint(engine=engine, tokenizer=engine.tokenizer, max_new_tokens=200)
    tasks = resolve("tests.agents.verifiers_taskset.sums")
    return await run_episode(endpoint, tasks(), tasks.prompts()[index], seed=0)  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_tools_run_and_rewards_are_the_tasks() -> None:
    """Goal: the tool's answer reaches the model, the weighted sum of the task's rewards the sample.

    Red with the trace left empty (reward 0), and with the tool's answer not recorded in it (no half).
    """
    episode = await play(call(a=7, b=8), "15")
    assert [message["role"] for message in episode.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert episode.messages[0]["content"] == "Add." and episode.messages[3]["content"] == "15"
    assert (episode.ended, episode.turn_rewards) == ("done", [0.0, 1.5])
    assert (await play("15")).turn_rewards == [1.0] and (await play("16")).turn_rewards == [0.0]
    assert (await play("3", index=1)).turn_rewards == [1.0]


@pytest.mark.anyio
async def test_wrong_calls_are_answered() -> None:
    """Goal: a tool's complaint, an unknown tool and a call that is no JSON go back to the model; one reward at the end.

    Red with the exception raised, and with the unreadable call taken for the last word.
    """
    unknown = '<tool_call>{"name": "sub", "arguments": {}}</tool_call>'
    episode = await play(call(a="seven", b=8), unknown, "<tool_call>{</tool_call>", "15")
    answers = [message["content"] for message in episode.messages if message["role"] == "tool"]
    assert answers[0].startswith("error: ") and "a" in answers[0]
    assert answers[1] == "error: no tool 'sub'; there is add"
    assert answers[2].startswith("error: the tool call is not JSON")
    assert episode.turn_rewards == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.anyio
async def test_the_tasks_stop_ends_the_episode() -> None:
    """Goal: @vf.stop is asked after each turn, and what it ends is scored. Red with hooks("stop") passed over."""
    episode = await play(*[call(a=7, b=8)] * 4)
    assert episode.ended == "done" and episode.turns == 4 and episode.turn_rewards[-1] == 0.5


def test_prompts_are_rows_of_a_data_set(tmp_path: Path, anyio_backend: str) -> None:
    """Goal: what write_prompts writes is read as rl_mixture reads it, and finds its task. Red without the key."""
    from tests.agents import verifiers_taskset

    tasks = verifiers_taskset.sums
    tasks.write_prompts(tmp_path / "sums.jsonl")
    rows = load_prompts_from_jsonl(tmp_path / "sums.jsonl")
    assert [tasks.task_of(row).data.b for row in rows] == [8, 2]
    assert rows[0]["messages"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "7+8?"},
    ]
    with pytest.raises(VerifiersError, match="task 0 has changed"):
        tasks.task_of({**rows[0], "verifiers_key": "other"})
    with pytest.raises(VerifiersError, match="verifiers_task=None; needs"):
        tasks.task_of("text")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("NeedsSetup", "has its own setup"),
        ("NeedsRuntime", "files takes runtime"),
        ("Contained", "needs a container"),
        ("Stateful", "StatefulToolset keep state"),
    ],
)
def test_what_needs_a_harness_is_refused(kind: str, reason: str, anyio_backend: str) -> None:
    """Goal: never a task without the half of its rewards. Each was red, and played on, without its check."""
    from tests.agents import verifiers_taskset

    with pytest.raises(VerifiersError, match=f"{kind}: .*{reason}"):
        verifiers_taskset.of(getattr(verifiers_taskset, kind)).prompts()
