"""From the device's log to counts: launches by kind, bytes, products, per phase of a step.

Every byte is counted once, by the part that knows it exactly:

    inductor   Triton kernels that Inductor wrote: its own count for each scheduled node
    ours       Triton kernels of pgolf: the tensors of each launch, each one's elements once;
               its CUDA kernels: those of each launcher, twice what the operator changes in place
    gemm       products: operands and result of each cuBLAS call, the result twice if it is added to
    aten       other kernels of torch: tensor arguments and results of the ATen call behind them
    memset     bytes written
    memcpy     bytes copied on the device, read and written
    attention  q, k, v, out, lse and their gradients, as FlashAttention's forward and backward take

Copies to and from the host are launches of kind memcpy that move no device bytes twice.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pgolf.errors import PgolfError

MANGLED = "_ZN5pgolf"  # what the kernels of pgolf's extension begin with
KINDS = ("inductor", "ours", "aten", "gemm", "attention", "memset", "memcpy")


class CountingError(PgolfError):
    """The counts do not add up, or the counted process failed."""


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def phases(events: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Events by phase; what comes before the first phase or in phase '' is left out."""
    by_phase: dict[str, list[dict[str, Any]]] = {}
    name = ""
    for event in events:
        if event["kind"] == "phase":
            name = event["name"]
        elif name:
            by_phase.setdefault(name, []).append(event)
    return by_phase


def kind_of(event: dict[str, Any]) -> str:
    """The kind of a launch, '' for an event that is none."""
    kind = event["kind"]
    if kind == "kernel":
        if event["api"] == "runtime":
            return "ours" if event["name"].startswith(MANGLED) else "aten"
        return "inductor" if event["name"].startswith("triton_") else "ours"
    return "memcpy" if kind.startswith("memcpy") else kind if kind in KINDS else ""


def kernel_name(event: dict[str, Any]) -> str:
    """The name of a kernel in its source: a mangled one without scopes and template arguments."""
    name = event["name"]
    if not name.startswith(MANGLED):
        return name
    rest, last = name.removeprefix("_ZN"), name
    while part := re.match(r"L?(\d+)", rest):
        end = part.end() + int(part[1])
        last, rest = rest[part.end() : end], rest[end:]
    return last


def bytes_of(event: dict[str, Any]) -> tuple[str, int]:
    """(kind, bytes) of an event; launches whose bytes another event holds have none."""
    kind = event["kind"]
    if kind == "memcpy_on_device":
        return "memcpy", 2 * event["bytes"]
    if kind.startswith("memcpy"):
        return "memcpy", event["bytes"]
    if kind in ("gemm", "memset", "attention"):
        return kind, event["bytes"]
    owner = {"launch": "ours", "compiled": "ours", "aten_call": "aten"}.get(kind, "")
    return owner, event.get("bytes", 0)


def gemm_name(operations: str, m: int, n: int, k: int, batch: int = 1, **_: Any) -> str:
    """The shape of a product in cuBLAS's terms, column-major: y = x W^T is TN, m the rows of W."""
    return f"{operations} {m}x{n}x{k}" + f" x{batch}" * (batch > 1)


def summarise(events: list[dict[str, Any]], inductor_bytes: int, peak: int) -> dict[str, Any]:
    """Counts of one phase.

    Args:
        inductor_bytes: by its own metric, of the graph that the phase ran.
        peak: most memory that torch held, in bytes.

    Raises:
        CountingError: a kernel that no event gives bytes for.
    """
    launches = Counter(kind for kind in map(kind_of, events) if kind)
    moved = Counter({"inductor": inductor_bytes})
    for event in events:
        kind, count = bytes_of(event)
        if kind:
            moved[kind] += count
    _check(events, launches)
    gemms = Counter(gemm_name(**e) for e in events if e["kind"] == "gemm")
    return {
        "launches": {**{k: launches[k] for k in KINDS}, "total": launches.total()},
        "bytes": {**{k: moved[k] for k in KINDS}, "total": moved.total()},
        "peak_memory": peak,
        "gemms": dict(sorted(gemms.items())),
        "kernels": dict(
            sorted(Counter(kernel_name(e) for e in events if kind_of(e) == "ours").items())
        ),
        "aten": dict(
            sorted(Counter(e["name"] for e in events if e["kind"] == "aten_call").items())
        ),
        "operators": operators(events),
    }


def _check(events: list[dict[str, Any]], launches: Counter) -> None:
    """Raise CountingError unless every kernel of torch's and of ours has its bytes."""
    ours = Counter(e["name"] for e in events if e["kind"] == "launch")
    kernels = [e for e in events if kind_of(e) == "ours"]
    seen = Counter(e["name"] for e in kernels if e["api"] == "driver")
    if ours != seen:
        raise CountingError(
            f"kernels on the device and launches of pgolf differ: {dict(seen - ours)} more, "
            f"{dict(ours - seen)} fewer"
        )
    compiled = sum(e["kernels"] for e in events if e["kind"] == "compiled")
    if compiled != len(kernels) - seen.total():
        raise CountingError(
            f"{len(kernels) - seen.total()} kernels of pgolf's extension were launched and "
            f"{compiled} counted"
        )
    counted = sum(e["kernels"] for e in events if e["kind"] == "aten_call")
    if counted != launches["aten"]:
        names = Counter(e["name"] for e in events if kind_of(e) == "aten")
        raise CountingError(
            f"{launches['aten']} kernels of torch were launched and {counted} counted: "
            f"{dict(names)}"
        )


def operators(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Operator of pgolf -> calls, launches and bytes inside it."""
    counters: dict[str, Counter] = {}
    inside: list[str] = []
    for event in events:
        if event["kind"] == "enter":
            inside.append(event["name"])
            counters.setdefault(event["name"], Counter())["calls"] += 1
        elif event["kind"] == "leave":
            inside.pop()
        elif inside:
            counter = counters[inside[-1]]
            counter["launches"] += bool(kind_of(event))
            counter["bytes"] += bytes_of(event)[1]
    return {name: dict(sorted(counters[name].items())) for name in sorted(counters)}
