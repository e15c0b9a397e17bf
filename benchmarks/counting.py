"""What a card would have to do, counted on fake tensors: kernels, bytes, FLOPs, waits of the host, collectives.

Operations are seen as torch dispatches them. Each that is no view counts as one kernel that reads its inputs and writes
its outputs once. What is compiled counts as its fused kernels (`fusion`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCT, ATTENTION, OTHER = "product", "attention", "elementwise"
# One launch of torch's multi-tensor kernels takes so many blocks, and a block so many elements (MultiTensorApply.cuh)
_BLOCKS_A_LAUNCH, _ELEMENTS_A_BLOCK = 320, 65_536
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select")
_GIVING_AS_MUCH = ("index_select", "gather", "index", "embedding")  # they read as much as they give
_NOT_READING = (
    "zero_",
    "fill_",
    "copy_",
    "_foreach_copy_",
    "index_copy_",
    "index_put_",
    "slice_scatter",
    "select_scatter",
)
_COLLECTIVES = ("c10d", "_c10d_functional")


@dataclass(frozen=True)
class Kernel:
    """What a card runs at a time. `launches` is above 1 for what takes lists of tensors."""

    part: str  # of the step: "blocks", "head", "optimizer"
    kind: str
    name: str
    bytes: int
    flops: int = 0
    launches: int = 1


class Counts:
    """All that was seen, in order; `part` names what comes next. Nothing is counted while `paused`."""

    def __init__(self, attention_lengths: tuple[int, ...] = ()) -> None:
        self.kernels: list[Kernel] = []
        self.waits: list[str] = []
        self.collectives: Counter[str] = Counter()
        self.operations = (
            0  # that the host dispatches one by one, views among them, those in compiled parts not
        )
        self.dispatched = 0  # and kernels that these launch
        self.part = "blocks"
        self.paused = False
        self.lengths = attention_lengths  # of the documents that attention runs over

    @contextmanager
    def counting(self) -> Iterator["Counts"]:
        """Count what runs inside. Numbers that are read come out as 1."""
        with (
            _Operations(self),
            _Reads(self),
            mock.patch.object(FakeTensor, "tolist", self._as_ones),
        ):
            yield self

    @property
    def _as_ones(self) -> Callable[[Tensor], Any]:
        def tolist(tensor: Tensor) -> Any:
            self.waits.append("tolist")
            return torch.ones(tensor.shape).tolist()

        return tolist

    def start_over(self) -> None:
        """Forget what was counted."""
        self.kernels, self.waits, self.collectives = [], [], Counter()
        self.operations = self.dispatched = 0

    def taken(self) -> "Counts":
        """What was counted, by itself; counting starts over."""
        found = Counts(self.lengths)
        found.kernels, found.waits, found.collectives = self.kernels, self.waits, self.collectives
        found.operations, found.dispatched = self.operations, self.dispatched
        self.start_over()
        return found

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Count one operation as the kernels that it is."""
        self.operations += 1
        moved = bytes_of(func, args, kwargs, out)
        if moved:
            kind, flops = self.work(func, args)
            self.kernels.append(
                Kernel(self.part, kind, func._opname, moved, flops, launches_of(args))
            )
            self.dispatched += self.kernels[-1].launches

    def work(self, func: Any, args: tuple[Any, ...]) -> tuple[str, int]:
        """The kind of an operation, and its FLOPs in matrix products."""
        name = func.overloadpacket.__name__
        if func.namespace == "torch_attn" and "varlen" in name:
            backward = "backward" in name
            query = args[1] if backward else args[0]
            products = 5 if backward else 2  # the backward pass computes the scores again
            scores = sum(length * length for length in self.lengths) // 2  # causal
            return ATTENTION, products * 2 * scores * query.shape[-2] * query.shape[-1]
        if name in PRODUCTS:
            left, right = args[:2] if name in ("mm", "bmm") else args[1:3]
            return PRODUCT, 2 * left.numel() * right.shape[-1]
        return OTHER, 0


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or self._counts.paused:
            return func(*args, **kwargs)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
            if wait := _wait_of(func, args):
                self._counts.waits.append(wait)
            if func._opname == "_local_scalar_dense":
                return 1.0
        out = func(*args, **kwargs)
        if func.namespace in _COLLECTIVES:
            self._counts.collectives[func._opname] += 1
        elif any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs, out))):
            self._counts.add(func, args, kwargs, out)
        return out


class _Reads(TorchFunctionMode):
    """Copies to the host, which are none where tensors lie there already."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "cpu" and isinstance(args[0], FakeTensor):
            self._counts.waits.append("cpu")
        return func(*args, **kwargs or {})


def _wait_of(func: Any, args: tuple[Any, ...]) -> str | None:
    name = func.overloadpacket.__name__
    masks = args[1] if name in {"index", "index_put", "index_put_"} else []
    choosing = any(mask is not None and mask.dtype is torch.bool for mask in masks)
    return name if choosing or name in _WAITING else None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def moves_nothing(func: Any) -> bool:
    """Whether an operation only looks at memory that is there, or takes some without writing."""
    name = func._opname
    looks = getattr(func, "is_view", False) or name in (
        "detach",
        "alias",
        "lift_fresh",
        "_unsafe_view",
        "_reshape_alias",
    )
    return looks or "empty" in name or func.namespace in ("prim", "profiler")


def bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """What an operation reads and writes. Indexing reads what it gives; a tensor that is read twice counts once."""
    if moves_nothing(func):
        return 0
    name = func._opname
    # reads parameter, gradient and both moments, writes all but the gradient
    if name == "_fused_adamw_":
        return sum(7 * nbytes(tensor) for tensor in args[0])
    written, changed, read = [], [], []
    named = {argument.name: argument for argument in func._schema.arguments}
    for argument, value in (
        *zip(func._schema.arguments, args, strict=False),
        *((named[k], v) for k, v in kwargs.items()),
    ):
        tensors = tensors_in(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            (written if argument.is_out else changed).extend(tensors)
        else:
            read.extend(tensors)
    if name in _GIVING_AS_MUCH:
        read = [*tensors_in(out), *(tensor for tensor in read[1:])]
    # a part of it is written
    if name in ("index_copy_", "index_put_", "_unsafe_masked_index_put_accumulate"):
        return 2 * sum(map(nbytes, read))
    if name not in _NOT_READING:
        read += changed
    unique = {
        (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape): tensor
        for tensor in read
    }
    touched = {id(tensor) for tensor in (*written, *changed)}
    made = [tensor for tensor in tensors_in(out) if id(tensor) not in touched]
    return sum(map(nbytes, unique.values())) + sum(map(nbytes, (*written, *changed, *made)))


def nbytes(tensor: Tensor) -> int:
    """Bytes of the memory behind a tensor; what is expanded counts once."""
    sizes = [
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0
    ]
    return math.prod(int(size) for size in sizes) * tensor.element_size()


def launches_of(args: tuple[Any, ...]) -> int:
    """1, or for an operation on a list of tensors what torch's multi-tensor kernels take."""
    if not args or not isinstance(args[0], (list, tuple)) or not tensors_in(args[0]):
        return 1
    blocks = sum(-(-tensor.numel() // _ELEMENTS_A_BLOCK) for tensor in tensors_in(args[0]))
    return max(1, -(-blocks // _BLOCKS_A_LAUNCH))
