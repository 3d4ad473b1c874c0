"""What runs in a step, kernel by kernel and operator by operator, and how long it is idle."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import opaque

SHOWN = 25  # kernels of a table
WIDTH = 64  # of their names


class Span(NamedTuple):
    """When a kernel ran (on a CPU: an operator that no other one called), in microseconds."""

    name: str
    start: float
    end: float


def profiled(step: Callable[[], Any], steps: int, device: torch.device) -> dict[str, Any]:
    """The profile of a step, the mean of several.

    Returns:
        'step_us' from the first kernel to the last, a step; 'idle_us' of it, in which no kernel
        ran; 'kernels' (on a CPU: operators of torch, without those that they call) and 'operators'
        (those of pgolf, with all that they call), the longest first, each with its 'name', 'calls'
        and 'us' a step, 'percent' of the step and, of operators, 'gbs': the bytes of its tensors,
        each read or written once, over its time.
    """
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    moved: dict[str, int] = defaultdict(int)

    def counted(operator: opaque.Operator, function: Callable, args: tuple, named: dict) -> Any:
        result = function(*args, **named)
        moved[operator.name] += operator.bytes(args, named, result)
        return result

    with opaque.intercepted(counted):
        step()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        wait()
    events = profiler.events()
    mine = [
        e for e in events
        if e.device_type == kind and not getattr(e, "is_user_annotation", False)
    ]  # fmt: skip
    spans = [
        Span(e.name, e.time_range.start, e.time_range.end)
        for e in mine
        if on_gpu or e.cpu_parent is None
    ]
    kernels = (
        [(s.name, s.end - s.start) for s in spans]
        if on_gpu
        else [(e.name, e.self_cpu_time_total) for e in mine]
    )
    ours = [
        (e.name, e.device_time_total if on_gpu else e.cpu_time_total)
        for e in events
        if e.name.startswith(opaque.NAMESPACE) and e.device_type == DeviceType.CPU
    ]
    return summarised(spans, kernels, ours, moved, steps)


def summarised(
    spans: Sequence[Span],
    kernels: Iterable[tuple[str, float]],
    ours: Iterable[tuple[str, float]],
    moved: Mapping[str, int],
    steps: int,
) -> dict[str, Any]:
    """As `profiled` gives it.

    Args:
        kernels, ours: each call of a kernel and of an operator of pgolf, and its microseconds.
        moved: bytes by operator, of one step.
    """
    if not spans:
        return {"step_us": 0.0, "idle_us": 0.0, "kernels": [], "operators": []}
    window = max(s.end for s in spans) - min(s.start for s in spans)
    operators = _rows(ours, window, steps)
    for row in operators:
        gbs = moved.get(row["name"], 0) / row["us"] / 1e3 if row["us"] else 0.0
        row["gbs"] = gbs or None
    return {
        "step_us": window / steps,
        "idle_us": (window - covered(spans)) / steps,
        "kernels": _rows(kernels, window, steps),
        "operators": operators,
    }


def _rows(
    pairs: Iterable[tuple[str, float]], window: float, steps: int
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    for name, spent in pairs:
        times[name].append(spent)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "name": name,
            "calls": len(each) / steps,
            "us": sum(each) / steps,
            "percent": 100 * sum(each) / window if window else 0.0,
        }
        for name, each in longest
    ]


def covered(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of these runs."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def table(profile: dict[str, Any]) -> str:
    """A profile as a table: our operators, then the longest kernels."""
    idle = 100 * profile["idle_us"] / profile["step_us"] if profile["step_us"] else 0.0
    lines = [f"    {profile['step_us'] / 1e3:.2f} ms, in {idle:.1f} % of it nothing runs"]
    for what in ("operators", "kernels"):
        lines.append(f"    {what:<{WIDTH}} calls        us     %   GB/s")
        for row in profile[what][:SHOWN]:
            rate = f"{row['gbs']:.0f}" if row.get("gbs") else "-"
            lines.append(
                f"    {row['name'][:WIDTH]:<{WIDTH}} {row['calls']:>5.4g} {row['us']:>9.1f} "
                f"{row['percent']:>5.1f} {rate:>6}"
            )
    return "\n".join(lines)
