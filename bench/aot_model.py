"""How long the row kernels would take on a GPU, as a model of two bounds: nothing here is measured.

    issue  = instructions of all warps / (SMs x 4 a cycle x clock)
    memory = bytes that have to move / bandwidth
    time   = the larger one

It leaves out latency, launches, uneven last waves and that both bounds add up where they are close:
a kernel is slower than this, one far below its bound has loads that wait for each other.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.aot_items import ITEMS, by_kernel

ISSUED = 4  # instructions that an SM issues a cycle: one of each of its schedulers
REACHED = 0.9  # of the published bandwidth, by a large copy


@dataclass(frozen=True)
class Gpu:
    """What bounds a kernel; the clock is that under load."""

    name: str
    sms: int
    gigahertz: float
    gigabytes: float  # a second, as published


GPUS = (Gpu("H100", 132, 1.755, 3350), Gpu("H200", 132, 1.755, 4800))


def bounds(kernel: str, instructions: float, gpu: Gpu) -> tuple[float, float]:
    """(issue, memory) in microseconds of a launch whose warps execute so many instructions each."""
    item = ITEMS[kernel]
    cycles = instructions * item.items / (gpu.sms * ISSUED)
    moved = (item.read + item.written) * item.items
    return cycles / gpu.gigahertz / 1e3, moved / (gpu.gigabytes * REACHED) / 1e3


def measured(kernel: str, gpu: Gpu, lines: Iterable[Mapping]) -> float | None:
    """Microseconds of a launch, by profiles of `bench step` on such a GPU; the least of several."""
    name, device, times = re.compile(rf"\b{kernel}\b"), re.compile(rf"\b{gpu.name}\b"), []
    for line in lines:
        if device.search(line.get("device", "")) and line.get("profile"):
            mine = [row for row in line["profile"]["kernels"] if name.search(row["name"])]
            calls = sum(row["calls"] for row in mine)
            times += [sum(row["us"] for row in mine) / calls] if calls else []
    return min(times, default=None)


def results(folder: Path) -> list[Mapping]:
    """The lines of all results, also in the folders that `bench gpu` makes for each device."""
    return [
        json.loads(line)
        for path in sorted(folder.rglob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def page(rows: Mapping[str, Mapping[str, float]], lines: Iterable[Mapping]) -> list[str]:
    """The model as text: a line a kernel, with what was measured."""
    constants = "; ".join(
        f"{g.name}: {g.sms} SMs, {g.gigahertz} GHz, {REACHED:.0%} of {g.gigabytes} GB/s"
        for g in GPUS
    )
    heads = (f"{gpu.name + ' issue':>11} memory larger measured" for gpu in GPUS)
    text = [
        "A MODEL, not measured: microseconds of a launch as the larger of two bounds,",
        f"issue = instructions / (SMs x {ISSUED} a cycle x clock), memory = bytes / bandwidth.",
        constants,
        "98,304 tokens; every operand is there (bench/aot_items.py says what a warp has to do).",
        " | ".join([f"{'kernel':28}", *heads]),
    ]
    for kernel, row in by_kernel(rows).items():
        cells = [f"{kernel:28}"]
        for gpu in GPUS:
            issue, memory = bounds(kernel, row["instructions"], gpu)
            known = measured(kernel, gpu, lines)
            time = "-" if known is None else f"{known:.0f}"
            cells.append(f"{issue:11.0f} {memory:6.0f} {max(issue, memory):6.0f} {time:>8}")
        text.append(" | ".join(cells))
    return text
