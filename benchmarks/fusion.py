"""The kernels of a compiled graph, by the rule that Inductor follows for a card, without a card.

Products and attention are kernels of their own. Elementwise operations and reductions that feed one another, with no
such kernel between them, are one: it reads from memory what others made and writes what others need. A sum over tokens
(a gradient of a norm's weight) runs across the rows of its neighbours, and is a kernel beside them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from benchmarks.counting import OTHER, PRODUCTS, Counts, Kernel, moves_nothing, nbytes, tensors_in

_SCATTERS = ("index_put", "_unsafe_masked_index_put_accumulate", "embedding_dense_backward")
_REDUCTIONS = ("sum", "mean", "amax", "linalg_vector_norm")


def compiler(counts: Counts, graphs: list[str]) -> Any:
    """A backend of `torch.compile` that counts the kernels of each run. `graphs` gets a name for each that is made."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def counted(name: str) -> Callable[..., Any]:
        def compile_graph(graph: GraphModule, example_inputs: Any) -> Callable[..., Any]:
            graphs.append(name)
            run = _Run(graph, counts)

            def call(inputs: list[Any]) -> Any:
                return run.boxed_run(inputs)

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        return compile_graph

    return aot_autograd(
        fw_compiler=counted("forward"),
        bw_compiler=counted("backward"),
        inference_compiler=counted("forward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


class _Run(Interpreter):
    """Runs a graph on fake tensors and counts its kernels."""

    def __init__(self, graph: GraphModule, counts: Counts) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._counts = counts
        self._plan = Plan(graph)

    def boxed_run(self, args_list: list[Any]) -> Any:
        with self._counts.pause():
            out = super().boxed_run(args_list)
        # A constant is made where it is used
        sizes = {
            node: 0 if self._plan.is_constant(node) else sum(map(nbytes, tensors_in(value)))
            for node, value in self.env.items()
        }
        self._counts.kernels += self._plan.kernels(sizes, self._counts.part)
        self.env.clear()
        return out

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if self._plan.is_extern(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._plan.work[n] = self._counts.work(n.target, args)
        return out


class Plan:
    """Which nodes of a graph are one kernel."""

    def __init__(self, graph: GraphModule) -> None:
        self.work: dict[Node, tuple[str, int]] = {}
        nodes = list(graph.graph.nodes)
        self._source = {node: self._behind(node) for node in nodes}
        self._groups: list[set[Node]] = self._fuse(
            [node for node in nodes if self._is_fusable(node)]
        )
        self._externs = [node for node in nodes if self.is_extern(node)]

    def is_extern(self, node: Node) -> bool:
        """Whether a node is a kernel of a library's."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        return node.target._opname in PRODUCTS or node.target.namespace in (
            "torch_attn",
            "rollouts",
        )

    def is_constant(self, node: Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and not self._sources(node)

    def kernels(self, sizes: dict[Node, int], part: str) -> list[Kernel]:
        """The kernels of a run in which nodes had these `sizes` in bytes."""
        found = []
        for node in self._externs:
            kind, flops = self.work[node]
            moved = sizes[node] + sum(sizes[source] for source in self._sources(node))
            found.append(Kernel(part, kind, node.target._opname, moved, flops))  # type: ignore[union-attr]
        for group in self._groups:
            found.extend(self._of_group(group, sizes, part))
        return found

    def _of_group(self, group: set[Node], sizes: dict[Node, int], part: str) -> list[Kernel]:
        kernels = []
        across = {node for node in group if _sums_over_rows(node)}
        rest = group - across
        if rest:
            outside = {source for node in rest for source in self._sources(node)} - rest
            written = {node for node in rest if self._leaves(node, rest)}
            moved = sum(sizes[node] for node in outside) + sum(sizes[node] for node in written)
            kernels.append(Kernel(part, OTHER, _name(rest), moved))
        for node in across:
            moved = sizes[node] + sum(sizes[source] for source in self._inputs_of(node, group))
            kernels.append(Kernel(part, OTHER, _name({node}), moved))
        return kernels

    def _inputs_of(self, node: Node, group: set[Node]) -> set[Node]:
        """What a sum over rows reads: what its elementwise neighbours read, and their sums along rows."""
        seen, found, todo = set(), set(), list(self._sources(node))
        while todo:
            source = todo.pop()
            if source in seen:
                continue
            seen.add(source)
            if source not in group or _is_reduction(source):
                found.add(source)
            else:
                todo.extend(self._sources(source))
        return found

    def _leaves(self, node: Node, group: set[Node]) -> bool:
        """Whether something outside of the group reads a node, a sum over its rows aside: that reads what it read."""
        return any(
            user not in group and not _sums_over_rows(user) for user in self._users(node)
        ) or (_is_reduction(node) and any(user not in group for user in self._users(node)))

    def _is_fusable(self, node: Node) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload) or self.is_extern(node):
            return False
        return (
            bool(tensors_in(node.meta.get("val")))
            and not moves_nothing(node.target)
            and bool(node.all_input_nodes)
        )

    def _behind(self, node: Node) -> Node:
        """The node whose memory this one looks at: itself, unless it is a view."""
        while (
            isinstance(node.target, torch._ops.OpOverload)
            and moves_nothing(node.target)
            and node.all_input_nodes
        ):
            node = node.all_input_nodes[0]
        return node

    def _sources(self, node: Node) -> set[Node]:
        return {
            behind
            for source in node.all_input_nodes
            if isinstance((behind := self._source[source]).meta.get("val"), (Tensor, tuple, list))
        }

    def _users(self, node: Node) -> set[Node]:
        found, todo = set(), list(node.users)
        while todo:
            user = todo.pop()
            if self._source.get(user, user) is not user:
                todo.extend(user.users)
            else:
                found.add(user)
        return found

    def _fuse(self, fusable: list[Node]) -> list[set[Node]]:
        """Connect nodes that feed one another and have as many library kernels before them."""
        members = set(fusable)
        level = self._levels(members)
        group = {node: {node} for node in fusable}
        for node in fusable:
            for source in self._sources(node) & members:
                if (
                    level[source] == level[node]
                    and not _scatters(node)
                    and not _sums_over_rows(source)
                ):
                    merged = group[source] | group[node]
                    for member in merged:
                        group[member] = merged
        return list({id(nodes): nodes for nodes in group.values()}.values())

    def _levels(self, members: set[Node]) -> dict[Node, int]:
        """How many library kernels a node waits for; one that is needed later is made where it is needed."""
        level: dict[Node, int] = {}
        for node in self._source:
            deepest = max((level[source] for source in self._sources(node)), default=0)
            level[node] = deepest + (self.is_extern(node) or _scatters(node))
        for node in reversed(self._source):
            if node in members and not _scatters(node) and (users := self._users(node)):
                needed = [
                    level[user] - (self.is_extern(user) or _scatters(user))
                    for user in users
                    if user.op != "output"
                ]
                if len(needed) == len(users):
                    level[node] = min(needed)
        return level


def _scatters(node: Node) -> bool:
    return getattr(node.target, "_opname", "") in _SCATTERS


def _is_reduction(node: Node) -> bool:
    return getattr(node.target, "_opname", "") in _REDUCTIONS


def _sums_over_rows(node: Node) -> bool:
    """Whether a node is a sum over leading dimensions: over tokens."""
    if not _is_reduction(node) or len(node.args) < 2 or not isinstance(node.args[1], (list, tuple)):
        return False
    source = node.args[0].meta.get("val")  # type: ignore[union-attr]
    last = source.ndim - 1
    return bool(node.args[1]) and all(dim % source.ndim != last for dim in node.args[1])  # type: ignore[operator]


def _name(nodes: set[Node]) -> str:
    names = sorted({node.target._opname for node in nodes})  # type: ignore[union-attr]
    return "+".join(names[:4]) + (f"+{len(names) - 4}" if len(names) > 4 else "")
