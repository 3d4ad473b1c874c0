"""Bytes of the kernels that Inductor wrote, by its own count.

Inductor counts each scheduled node: the buffers that it reads and writes, each at most once, and
not those that its fusion removed. Its total also holds the operands of what is not its own (calls
of cuBLAS, opaque operators); those nodes are told apart here, since the device sees them run.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Graph:
    """A compiled graph.

    Attributes:
        backward: whether it is a backward pass.
        bytes: of its Triton kernels.
        metric: `num_bytes_accessed`, all nodes: what others publish.
        extern: number of nodes that are calls, by name.
        nodes: (kernel's first operations, bytes) of its Triton kernels, in order.
    """

    backward: bool
    bytes: int
    metric: int
    extern: dict[str, int]
    nodes: list[tuple[str, int]]


@contextlib.contextmanager
def recorded() -> Iterator[list[Graph]]:
    """Inside, the graphs that Inductor compiles are added to the list.

    Needs TORCH_LOGS=inductor_metrics and no caches, as `build.environment` sets.
    """
    from torch._inductor.graph import GraphLowering

    graphs: list[Graph] = []
    original = GraphLowering.count_bytes

    def count_bytes(self: GraphLowering) -> Any:
        result = original(self)
        graphs.append(_graph(self, result[0]))
        return result

    GraphLowering.count_bytes = count_bytes
    try:
        yield graphs
    finally:
        GraphLowering.count_bytes = original


def _graph(lowering: Any, metric: int) -> Graph:
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    extern: dict[str, int] = {}
    nodes: list[tuple[str, int]] = []
    for node in lowering.scheduler.nodes:
        if isinstance(node, ExternKernelSchedulerNode):
            call = str(getattr(node.node, "op_overload", None) or type(node.node).__name__)
            extern[call] = extern.get(call, 0) + 1
        else:
            origins = (o for part in node.get_nodes() for o in part.node.get_origins())
            names = dict.fromkeys(str(o.target) for o in origins if o.op == "call_function")
            nodes.append((" ".join(names), node.get_read_write_buffers_sizes()))
    return Graph(
        lowering.is_backward, sum(count for _, count in nodes), metric, extern, nodes
    )
