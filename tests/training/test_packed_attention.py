"""Packed attention under torch.compile: what is compiled once serves any batch."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rollouts.training import packed_attention
from rollouts.training.packed_attention import Documents


def test_the_number_of_documents_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: micro-batches of any documents run the same compiled code; after 8 kinds dynamo would give up compiling.

    CUDA's kernel is stood in for, the code around it is the real one. Red with `max(documents.lengths)` in it: 5 times.
    """

    def kernel(query: Any, key: Any, value: Any, *offsets_and_longest: Any, **options: Any) -> Any:
        return query + key + value + offsets_and_longest[2]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    counter = CompileCounter()
    compiled = torch.compile(packed_attention._by_kernel, backend=counter, dynamic=True)
    for lengths in ([5, 6], [4, 2, 9], [7, 2, 2, 2], [3, 3, 3, 2, 2], [9, 1, 1, 1, 1, 1]):
        query, key = torch.randn(1, 4, sum(lengths), 8), torch.randn(1, 2, sum(lengths), 8)
        compiled(query, key, key, Documents.of(lengths, query.device), None, None)
    assert counter.frame_count == 1
