"""Tasks of the `verifiers` library (0.4, extra `verifiers`) as environments: its prompts, tools, stops and rewards.

The episode is ours, token-exact, without verifiers' harnesses and sandboxes. So a task that needs one is refused: a
container, its own `setup` or `finalize`, a reward or metric that takes a runtime, tools that keep state or run
elsewhere. asyncio alone, as the library.
"""

import inspect
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rollouts.agents.environment import Message, Reply
from rollouts.training.types import Prompt

# columns of a prompt row: the task's index, and its key
TASK, KEY = "verifiers_task", "verifiers_key"


class VerifiersError(ValueError):
    """A taskset that cannot be played here, or a prompt row of another one. The message says what is missing."""


class VerifiersTasks:
    """A `verifiers.v1.Taskset`: its prompts, and, called, an environment. `rl.agent.environment` names an instance.

    `tasks = VerifiersTasks(MyTaskset(MyConfig(id="mine")))` in your own module;
    `tasks.write_prompts("data/mine.jsonl")` makes the rows of `data.rl_mixture`, format "messages".
    """

    def __init__(self, taskset: Any) -> None:
        self.taskset = taskset

    @cached_property
    def tasks(self) -> list[Any]:
        """Return every task, in order. Raises VerifiersError for one that cannot be played here."""
        if not self.taskset.bounded:
            raise VerifiersError(f"{_name(self.taskset)}: has no end; bound it with take(n)")
        tasks = list(self.taskset)
        for kind in {type(task): task for task in tasks}.values():
            problems = list(_problems(self.taskset, kind))
            if problems:
                raise VerifiersError(f"{_name(kind)}: {'; '.join(problems)}")
        return tasks

    def prompts(self) -> list[dict[str, Any]]:
        """Return a prompt row of each task: its messages, and which task it is."""
        return [
            {"messages": _opening(task), "answer": "", TASK: index, KEY: task.key}
            for index, task in enumerate(self.tasks)
        ]

    def write_prompts(self, path: Path | str) -> None:
        """Write the rows as a .jsonl file."""
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in self.prompts()))

    def __call__(self) -> "VerifiersEnvironment":
        return VerifiersEnvironment(self)

    def task_of(self, prompt: Prompt) -> Any:
        """Return the task of a prompt row. Raises VerifiersError for a row of another or of a changed taskset."""
        index = prompt.get(TASK) if isinstance(prompt, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(self.tasks):
            need = f"needs {TASK!r}, 0 to {len(self.tasks) - 1}: rows that write_prompts wrote"
            raise VerifiersError(f"{_name(self.taskset)}: prompt has {TASK}={index!r}; {need}")
        task = self.tasks[index]
        if isinstance(prompt, dict) and prompt.get(KEY) != task.key:
            raise VerifiersError(
                f"{_name(self.taskset)}: task {index} has changed since the row was written (key {task.key}, the "
                f"row has {prompt.get(KEY)}): write the prompts again"
            )
        return task


class VerifiersEnvironment:
    """One episode of a task. The turn that ends it has the task's reward; an episode cut off at a limit has none."""

    def __init__(self, source: VerifiersTasks) -> None:
        self._source = source
        # the tool's name for the model -> its server, its name there
        self._servers: dict[str, tuple[Any, str]] = {}
        self._schemas: list[dict[str, Any]] = []

    def tools(self) -> list[dict[str, Any]]:
        return self._schemas

    async def start(self, prompt: Prompt) -> list[Message]:
        import verifiers.v1 as vf
        from verifiers.v1.state import state_cls

        self._task = task = self._source.task_of(prompt)
        self._trace = vf.Trace(
            task=vf.TraceTask(type=_name(task), data=task.data, key=task.key, hash=task.hash),
            state=state_cls(type(task))(),
            agent=vf.AgentInfo(config=vf.AgentConfig(model="policy")),
        )
        taskset = self._source.taskset
        for toolset in type(taskset).toolsets(taskset.config):
            await self._add(toolset)
        for toolset in type(task).toolsets(task.config):
            await self._add(toolset, task.data)
        opening = _opening(task)
        self._said: list[Any] = [_MESSAGES[message["role"]](message) for message in opening]
        return opening

    async def _add(self, toolset: Any, data: Any = None) -> None:
        """Offer a toolset's tools, which then run in this process."""
        from mcp.server.mcpserver import MCPServer

        await toolset.setup()
        if data is not None:
            await toolset.setup_task(data)
        server = MCPServer(toolset.server_name or _name(toolset))
        toolset.register(server)
        for tool in await server.list_tools():
            name = f"{toolset.server_name}_{tool.name}" if toolset.server_name else tool.name
            function = {
                "name": name,
                "description": tool.description or "",
                "parameters": tool.input_schema,
            }
            self._schemas.append({"type": "function", "function": function})
            self._servers[name] = server, tool.name

    async def respond(self, message: Message) -> Reply:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        first = sum(said.role == "tool" for said in self._said)
        ids = [f"call_{first + place}" for place in range(len(calls))]
        self._record(message, calls, ids)
        if not calls or await self._stopped():
            await self._task.score(self._trace)
            return Reply([], done=True, reward=float(self._trace.reward))
        answers = [await self._call(call) for call in calls]
        for answer, call_id in zip(answers, ids, strict=True):
            self._said.append(_MESSAGES["tool"]({**answer, "tool_call_id": call_id}))
        return Reply(answers, done=False)

    def _record(self, message: Message, calls: list[dict[str, Any]], ids: list[str]) -> None:
        """Add the turn to the library's trace, which its rewards read."""
        import verifiers.v1 as vf
        from verifiers.v1.graph import prepare_turn

        own = [
            vf.ToolCall(id=call_id, name=call["name"], arguments=json.dumps(call["arguments"]))
            for call, call_id in zip(calls, ids, strict=True)
        ]
        spoken = vf.AssistantMessage(content=message["content"], tool_calls=own or None)
        reason = "tool_calls" if own else "stop"
        turn = prepare_turn(self._trace, list(self._said))
        turn.commit(
            vf.Response(id="", created=0, model="policy", message=spoken, finish_reason=reason)
        )
        self._said.append(spoken)

    async def _stopped(self) -> bool:
        from verifiers.v1.utils.decorators import invoke

        for stop in self._task.hooks("stop"):
            value = invoke(stop, {"task": self._task.data, "trace": self._trace})
            if await value if inspect.isawaitable(value) else value:
                return True
        return False

    async def _call(self, call: dict[str, Any]) -> Message:
        answer: Message = {"role": "tool", "name": call["name"]}
        if call["name"] not in self._servers:
            return {
                **answer,
                "content": f"error: no tool {call['name']!r}; there is {', '.join(self._servers)}",
            }
        server, name = self._servers[call["name"]]
        try:
            result = await server.call_tool(name, call["arguments"])
        except Exception as error:  # a tool may raise anything, also for wrong arguments: the model gets the message
            return {**answer, "content": f"error: {error}"}
        return {
            **answer,
            "content": "\n".join(part.text for part in result.content if hasattr(part, "text")),
        }


def _opening(task: Any) -> list[Message]:
    """Return the messages that the episode begins with."""
    data = task.data
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return [*system, *({"role": said.role, "content": _text(said.content)} for said in data.prompt)]


def _text(content: Any) -> str:
    from verifiers.v1.types import content_text

    return content_text(content)


def _problems(taskset: Any, task: Any) -> Iterator[str]:
    """Yield each reason why tasks like this one cannot be played without verifiers' own harness."""
    import verifiers.v1 as vf

    kind = type(task)
    if task.NEEDS_CONTAINER:
        yield "needs a container"
    for name in ("setup", "finalize"):
        if getattr(kind, name) is not getattr(vf.Task, name):
            yield f"has its own {name}, which needs a runtime"
    if task.data.prompt is None:
        yield "has no prompt: a user opens the conversation"
    if task.config.judges:
        yield "has judges plugged in by its config; call them from a reward of the task"
    for hook in (hook for name in ("reward", "metric", "stop") for hook in task.hooks(name)):
        if not {"task", "trace"} >= set(_required(hook)):
            yield f"{hook.__name__} takes {', '.join(_required(hook))}; only task and trace exist here"
    for toolset in (*type(taskset).toolsets(taskset.config), *kind.toolsets(task.config)):
        if toolset._state_cls is not vf.State:
            yield f"tools {_name(toolset)} keep state, which they share with a harness"
        if getattr(toolset.config, "url", None):
            yield f"tools {_name(toolset)} run elsewhere, at {toolset.config.url}"


def _required(hook: Any) -> Iterator[str]:
    for name, parameter in inspect.signature(hook).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            yield name


def _name(value: Any) -> str:
    return type(value).__name__


def _system(message: Message) -> Any:
    import verifiers.v1 as vf

    return vf.SystemMessage(content=message["content"])


def _user(message: Message) -> Any:
    import verifiers.v1 as vf

    return vf.UserMessage(content=message["content"])


def _assistant(message: Message) -> Any:
    import verifiers.v1 as vf

    return vf.AssistantMessage(content=message["content"])


def _tool(message: Message) -> Any:
    import verifiers.v1 as vf

    return vf.ToolMessage(
        tool_call_id=message["tool_call_id"], content=message["content"], name=message["name"]
    )


_MESSAGES = {"system": _system, "user": _user, "assistant": _assistant, "tool": _tool}
