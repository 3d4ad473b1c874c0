"""A replayed step beside the eager one, as the counting device logged them.

Launch by launch: graphs hold what the eager step started, in that order. Pointer by pointer,
where the log has them (see device/README.md): a launch of a graph goes to the same address as the
eager one, or both go to tensors that only the step has, the graph's in its own pool.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.counting.launches import CountingError, kind_of

Span = tuple[int, int]  # addresses, from the first to before the last
SENT = "memcpy_to_device"
PLACE = ("arguments", "stream")


def compare(
    eager: Sequence[dict[str, Any]],
    replayed: Sequence[dict[str, Any]],
    own: Iterable[Span],
    kept: Iterable[Span],
    before: int,
) -> int:
    """How many addresses were compared.

    Args:
        eager, replayed: the events of two steps.
        own: what a graph has for itself: its pool, and the tokens.
        kept: tensors that outlive a step: a launch on them has to stay there.
        before: launches of the eager step that are in no graph: those after its first copy to the
            device, which make tokens of it.

    Raises:
        CountingError: they differ.
    """
    own, kept = list(own), list(kept)
    first = next((i for i, e in enumerate(replayed) if e["kind"] == "graph"), len(replayed))
    works = _works(replayed[first:])
    sent = next((i for i, e in enumerate(eager) if e["kind"] == SENT), 0)
    steps = _works(eager[:sent]) + _works(eager[sent:])[before:]
    if len(steps) != len(works) or not works:
        raise CountingError(f"{len(works)} launches in graphs, {len(steps)} in an eager step")
    compared = 0
    for one, other in zip(steps, works, strict=True):
        if _plain(one) != _plain(other):
            raise CountingError(f"a graph launches {_plain(other)} where there was {_plain(one)}")
        pairs = list(zip(one.get("arguments", ()), other.get("arguments", ()), strict=True))
        compared += len(pairs)
        for a, b in pairs:
            if a != b and (_in(a, kept) or not _in(b, own)):
                raise CountingError(f"{_plain(one)} goes to {b:#x} in a graph, and to {a:#x}")
    return compared


def _works(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches and collectives; what the host sends goes before the graphs, whatever its place."""
    return [
        e
        for e in events
        if (kind_of(e) and e["kind"] != SENT) or e["kind"] == "collective"
    ]


def _plain(event: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k not in PLACE}


def _in(address: int, spans: Iterable[Span]) -> bool:
    return any(start <= address < end for start, end in spans)


def spans(tensors: Iterable[Any]) -> list[Span]:
    """Where tensors lie; an empty one lies nowhere."""
    return [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes]


def pool_of(graph: Any) -> list[Span]:
    """The memory of a `torch.cuda.CUDAGraph`'s pool."""
    import torch

    return [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == tuple(graph.pool())
    ]
