"""Who may join the batch next: rows in order of arrival, and weight updates between them. Model thread alone."""

from collections import deque
from collections.abc import Callable, Sequence

from rollouts.engines.embedded.batch import BatchRow


class Line:
    """Rows that wait for a place in the batch. An update waits for all rows before it; later rows wait behind it."""

    def __init__(self) -> None:
        self._waiting: deque[BatchRow] = deque()
        self._updates: deque[Callable[[], None]] = deque()
        self._behind_update: deque[BatchRow] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._behind_update)

    @property
    def may_join(self) -> int:
        """How many rows have no update before them."""
        return len(self._waiting)

    @property
    def has_update(self) -> bool:
        return bool(self._updates)

    @property
    def updates_waiting(self) -> int:
        return len(self._updates)

    def add(self, rows: Sequence[BatchRow]) -> None:
        (self._behind_update if self._updates else self._waiting).extend(rows)

    def add_update(self, update: Callable[[], None]) -> None:
        self._updates.append(update)

    def take(self, count: int) -> list[BatchRow]:
        """Take the first `count` rows that may join."""
        return [self._waiting.popleft() for _ in range(count)]

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        """Put rows at the head of the line, in their order."""
        self._waiting.extendleft(reversed(rows))

    def remove(self, is_meant: Callable[[BatchRow], bool]) -> list[BatchRow]:
        """Take out all rows that are meant, wherever they wait."""
        removed: list[BatchRow] = []
        for queue in (self._waiting, self._behind_update):
            removed += [row for row in queue if is_meant(row)]
            kept = [row for row in queue if not is_meant(row)]
            queue.clear()
            queue.extend(kept)
        return removed

    def run_updates(self, *, paused: bool, running: bool) -> None:
        """Run the updates that are due: all of them while paused, else when no row is left before them."""
        while self._updates and (paused or not (running or self._waiting)):
            self._updates.popleft()()
        if not self._updates:
            self._waiting.extend(self._behind_update)
            self._behind_update.clear()
