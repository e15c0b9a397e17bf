"""Remember which weights an engine was given, and how to give it the newest again."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from rollouts.training.inference.inference_engine import InferenceEngine

# gives a client's engine weights, and proves that it serves them
Give = Callable[[InferenceEngine], Awaitable[object]]


class GivenWeights:
    """The weight versions of one engine. One that was never given any serves its start model."""

    def __init__(self) -> None:
        self.give: Give | None = None  # gives the newest version
        self.versions: list[str] = []  # all that were given, or are being given
        self.settled = 0  # index of the newest one that is proven

    @property
    def newest(self) -> str | None:
        return self.versions[-1] if self.versions else None

    def since(self, settled: int) -> Sequence[str]:
        """Return the versions from the one that was settled then to the newest."""
        return self.versions[settled:]

    def explain(self, version: str) -> bool:
        """Return whether an engine that was not started again may serve `version`."""
        return not self.versions or version in self.since(self.settled)

    @contextmanager
    def receiving(self, version: str, give: Give) -> Iterator[None]:
        """Count `version` as being given within the context, and as settled after it. An error undoes both."""
        before = self.give
        self.give = give
        self.versions.append(version)
        try:
            yield
        except BaseException:
            self.give = before
            self.versions.pop()
            raise
        self.settled = len(self.versions) - 1
