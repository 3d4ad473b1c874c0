"""Captures and replays work on the counting device: see test_counting_graph.py.

    python counting_graph.py LOG
"""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.counting.client import Device
from bench.counting.replay import pool_of, spans
from pgolf.ops.xsa import xsa


def captured(work: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


def outcome(work: Callable[[], None], stream: torch.cuda.Stream) -> str:
    """'' or the error of a capture."""
    try:
        captured(work, stream)
    except RuntimeError as e:
        first = e
        while first.__context__:  # what spoilt the capture, before its end was an error too
            first = first.__context__
        return str(first).splitlines()[0]
    return ""


def main(log: Path) -> None:
    os.environ.pop("LD_PRELOAD", None)
    device = Device(log)
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.zeros(64, 64, device="cuda", requires_grad=True)
    y = torch.zeros(2, 8, 4, 16, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros(2, 8, 2, 16, device="cuda", dtype=torch.bfloat16)
    out, pinned = torch.zeros(64, device="cuda"), torch.zeros(64, pin_memory=True)
    event = torch.cuda.Event()
    event.record()

    def turn() -> None:
        xsa(y, v, "triton")
        x.grad = None
        (x @ x).sum().backward()
        out.copy_(pinned, non_blocking=True)
        device.work(kind="attention", name="forward", bytes=1)

    def eager(name: str) -> None:
        device.note(kind="phase", name=name)
        with torch.cuda.stream(stream):
            turn()
        device.note(kind="phase", name="")

    def forked() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            out.add_(1)

    def joined() -> None:
        forked()
        torch.cuda.current_stream().wait_stream(side)

    def elsewhere() -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            out.add_(1)

    def called(name: str, *arguments: object) -> None:
        """A function of the runtime that torch would not call there."""
        if getattr(library, name)(*arguments):
            raise RuntimeError(ctypes.c_char_p(library.cudaGetErrorString(900)).value.decode())

    library = ctypes.CDLL(None)
    library.cudaGetErrorString.restype = ctypes.c_void_p
    address = ctypes.c_void_p()
    copy = (
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(torch.zeros(64).data_ptr()),
        ctypes.c_size_t(4), 1, ctypes.c_void_p(stream.cuda_stream),
    )  # fmt: skip

    eager("warm")
    eager("eager")
    device.note(kind="phase", name="capture")
    graph = captured(turn, stream)
    device.note(kind="phase", name="")
    pinned.fill_(3.0)
    device.note(kind="phase", name="replay")
    graph.replay()
    device.note(kind="phase", name="")
    said = {
        "joined": outcome(joined, stream),
        "unjoined": outcome(forked, stream),
        "wait": outcome(lambda: out.sum().item(), stream),
        "synchronize": outcome(torch.cuda.synchronize, stream),
        "pageable": outcome(lambda: called("cudaMemcpyAsync", *copy), stream),
        "query": outcome(event.query, stream),
        "legacy stream": outcome(elsewhere, stream),
        "allocation": outcome(lambda: called("cudaMalloc", ctypes.byref(address), 4), stream),
        "after all": outcome(turn, stream),
    }
    copied = torch.zeros(64, pin_memory=True)
    copied.copy_(out)
    device.note(
        kind="told", said=said, copied=copied.tolist()[:2], pool=pool_of(graph), x=spans([x])[0]
    )
    graph.reset()
    device.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
