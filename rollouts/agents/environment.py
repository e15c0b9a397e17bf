"""Environments of agents: the interface, a calculator, and a second try. They see messages alone, no tokens."""

from dataclasses import dataclass
from typing import Any, Protocol

from rollouts.data_formats.calculator_turns import CALCULATOR_TOOL
from rollouts.training.calculator import calculate
from rollouts.training.rewards.row_answer import answers_of
from rollouts.training.types import Prompt, Sample

# {"role", "content"}, and "tool_calls" on an assistant's, as chat templates take them
Message = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An environment's answer to one message of the assistant: the messages that follow it, for the next turn."""

    messages: list[Message]
    done: bool  # the episode ends here; `messages` are then ignored
    reward: float = 0.0  # for this turn


class Environment(Protocol):
    """One episode's surroundings: made anew for each, so it may keep state. An exception from it ends the rollout."""

    def tools(self) -> list[dict[str, Any]]:
        """Return JSON schemas of the tools, as chat templates take them; [] for none."""
        ...

    async def start(self, prompt: Prompt) -> list[Message]:
        """Return the messages that the episode begins with."""
        ...

    async def respond(self, message: Message) -> Reply:
        """Answer an assistant's message. Answer a call that cannot be carried out, too, rather than raise."""
        ...


class CalculatorEnvironment:
    """A question, and a tool `calculator(expression)`: the episode goes on while the assistant calls it.

    The prompt is text, or a row with "messages". The tool answers with the value as text, or with an error that says
    what is allowed. It gives no reward: a reward function looks at the finished sample.
    """

    def tools(self) -> list[dict[str, Any]]:
        return [CALCULATOR_TOOL]

    async def start(self, prompt: Prompt) -> list[Message]:
        return (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else list(prompt["messages"])
        )

    async def respond(self, message: Message) -> Reply:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        results = [
            {"role": "tool", "name": call["name"], "content": _answer(call)} for call in calls
        ]
        return Reply(results, done=not calls)


class AskAgain:
    """A row with a question and its "answer": after a wrong answer the question is asked again, for half the reward.

    Only a right answer ends the episode here, else `turns_max` does. Raises ValueError for a row without an answer.
    """

    def __init__(self) -> None:
        self._worth = 1.0

    def tools(self) -> list[dict[str, Any]]:
        return []

    async def start(self, prompt: Prompt) -> list[Message]:
        if not isinstance(prompt, dict) or not prompt.get("answer"):
            raise ValueError("the row has no 'answer', which AskAgain needs")
        self._answers = {text.strip() for text in answers_of(Sample(prompt=prompt))}
        self._question = prompt["messages"][-1]
        return list(prompt["messages"])

    async def respond(self, message: Message) -> Reply:
        if message["content"].strip() in self._answers:
            return Reply([], done=True, reward=self._worth)
        self._worth /= 2
        return Reply([self._question], done=False)


def _answer(call: dict[str, Any]) -> str:
    if call["name"] != "calculator":
        return f"error: no tool {call['name']!r}; there is calculator"
    expression = call["arguments"].get("expression")
    if not isinstance(expression, str):
        return f"error: expression={expression!r}; needs a string"
    value = calculate(expression)
    return (
        f"error: cannot work out {expression[:80]!r}; needs numbers with + - * / ( )"
        if value is None
        else value
    )
