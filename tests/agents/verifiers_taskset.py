"""A taskset of the real verifiers library, for tests/agents/test_verifiers_tasks.py: sums, with a tool that adds."""

import verifiers.v1 as vf

from rollouts.agents.verifiers_tasks import VerifiersTasks


class SumData(vf.TaskData):
    a: int
    b: int


class AddToolset(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, task: SumData, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(task.a + task.b))

    @vf.reward(weight=0.5)
    async def used_the_tool(self, trace: vf.Trace) -> float:
        return float(any(message.content == "15" for message in trace.tool_messages))

    @vf.stop
    async def three_tools(self, trace: vf.Trace) -> bool:
        return len(trace.tool_messages) >= 3

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [AddToolset(vf.ToolsetConfig())]


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> list[SumTask]:
        return [
            SumTask(SumData(prompt=f"{a}+{b}?", system_prompt="Add.", a=a, b=b), vf.TaskConfig())
            for a, b in ((7, 8), (1, 2))
        ]


class NeedsSetup(SumTask):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        """Something in a sandbox."""


class NeedsRuntime(SumTask):
    @vf.reward
    async def files(self, runtime: vf.Runtime) -> float:
        return 1.0


class Contained(SumTask):
    NEEDS_CONTAINER = True


class Counter(vf.State):
    count: int = 0


class StatefulToolset(vf.Toolset[vf.ToolsetConfig, Counter]):
    """Would share a state with a harness."""


class Stateful(SumTask):
    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [StatefulToolset(vf.ToolsetConfig())]


def of(kind: type[SumTask]) -> VerifiersTasks:
    class Only(vf.Taskset[kind, vf.TasksetConfig]):  # type: ignore[valid-type]
        def load(self) -> list[SumTask]:
            return [kind(SumData(prompt="1+1?", a=1, b=1), vf.TaskConfig())]

    return VerifiersTasks(Only(vf.TasksetConfig()))


sums = VerifiersTasks(Sums(vf.TasksetConfig()))
