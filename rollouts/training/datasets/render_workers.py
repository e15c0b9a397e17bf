"""Chat templates rendered in several processes: for data sets that take minutes in one."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from rollouts.training.datasets.chat import Conversation, Rendering, render_conversations
from rollouts.training.seams import Tokenizer

CHUNKS_PER_WORKER = 2  # under way: one is rendered, the next waits for it
_kept: dict[str, Any] = {}  # in a worker process, for all its chunks


def render_chunks(
    tokenizer: Tokenizer, chunks: Iterable[Sequence[Conversation]], *, num_workers: int
) -> Iterator[list[list[Rendering]]]:
    """Yield `render_conversations` of each chunk, in order; with 0 workers in this process.

    A stream is read no further ahead than the workers need. They are new interpreters (spawn: a fork of a process with
    threads can hang), so a script that asks for them runs under `if __name__ == "__main__":`. Raises what a chunk's
    rendering raises, in its turn. The workers end with the iteration, however it ends.
    """
    if num_workers == 0:
        yield from (render_conversations(tokenizer, chunk) for chunk in chunks)
        return
    pending: deque[Future[list[list[Rendering]]]] = deque()
    pool = ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=_start, initargs=(tokenizer,)
    )
    try:
        for chunk in chunks:
            pending.append(pool.submit(_render, chunk))
            if len(pending) > CHUNKS_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer: Tokenizer) -> None:
    _kept["tokenizer"] = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _render(chunk: Sequence[Conversation]) -> list[list[Rendering]]:
    return render_conversations(_kept["tokenizer"], chunk)
