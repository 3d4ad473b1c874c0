"""Timing: interleaved rounds, medians, and the machine's own limits measured in the same rounds.

Everything that is compared runs once a round, each round in another order, so that a drift of
clocks, a busy neighbour, or the caches and free memory that one leaves to the next meet all alike.
"""

import ctypes
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

WARM_UP = 2  # rounds that do not count
LEAST_ROUNDS = 3
# A matmul that is long enough to reach the device's rate: 2 n^3 operations.
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
HEAD_START = 200_000  # cycles that a GPU waits while the host queues the work to be timed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt

Clock = Callable[[Callable[[Any], Any], Any], float]


class Entry(NamedTuple):
    """Something to time: `run(prepare())`, with only `run` on the clock."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Summary(NamedTuple):
    """Milliseconds: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def summarise(milliseconds: Sequence[float]) -> Summary:
    """Percentiles, interpolated linearly between neighbours."""
    return Summary(*np.percentile(milliseconds, (50, 20, 80)).tolist())


def shuffled(names: Sequence[str], turn: int) -> list[str]:
    """The order of round number `turn`, the same in every run.

    Turning a fixed order by one would let each entry follow the same other one in every round.
    """
    return random.Random(turn).sample(names, len(names))


def interleave(
    entries: Mapping[str, Entry],
    rounds: int,
    clock: Clock,
    before: Callable[[], None] = lambda: None,
    seconds: float = float("inf"),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each entry in each round.

    Args:
        before: called before each entry, off the clock; flushes caches, for example.
        seconds: fewer rounds are made (never below LEAST_ROUNDS) if all would take longer; an
            empty result if even those would.
        tick: called after each round that counts.
    """
    names, times = list(entries), {name: [] for name in entries}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-WARM_UP, rounds):
            started = time.perf_counter()
            for name in shuffled(names, turn):
                run, prepare = entries[name]
                state = prepare()
                before()
                spent = clock(run, state)
                del state
                if turn >= 0:
                    times[name].append(spent)
            if turn == -1:
                rounds = _affordable(rounds, time.perf_counter() - started, seconds)
            if turn >= 0:
                tick()
            if turn + 1 >= rounds:
                break
    finally:
        if was_enabled:
            gc.enable()
    return times if rounds else {}


def _affordable(rounds: int, round_seconds: float, seconds: float) -> int:
    """How many rounds fit into a time; 0 if it is too short for the least number."""
    if round_seconds * rounds <= seconds:
        return rounds
    fitting = int(seconds / round_seconds)
    return fitting if fitting >= LEAST_ROUNDS else 0


def clock_of(device: torch.device) -> Clock:
    """A function that runs something once and returns its milliseconds on `device`."""
    return _cuda_clock if device.type == "cuda" else _cpu_clock


def _cpu_clock(run: Callable[[Any], Any], state: Any) -> float:
    started = time.perf_counter()
    result = run(state)
    spent = time.perf_counter() - started
    del result  # giving memory back is not on the clock
    return 1e3 * spent


def _cuda_clock(run: Callable[[Any], Any], state: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # On an idle stream two events would time the host that queues the work.
    torch.cuda._sleep(HEAD_START)
    start.record()
    result = run(state)
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end)


# --- the machine ----------------------------------------------------------------------------------


def copy_entry(nbytes: int, device: torch.device) -> Entry:
    """A copy that moves `nbytes` in all: half of them read, half of them written."""
    source = torch.full((max(nbytes // 2, 1),), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)  # its pages exist before the clock starts
    return Entry(lambda _: target.copy_(source))


def matmul_entry(device: torch.device, dtype: torch.dtype) -> tuple[Entry, int]:
    """A square matmul in `dtype`, and its floating-point operations."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return Entry(lambda _: torch.matmul(a, b, out=out)), 2 * n**3


def floor_ms(nbytes: int, flops: int, bytes_per_ms: float, flops_per_ms: float | None) -> float:
    """Least time of some work at the measured rates: the larger of memory's and arithmetic's."""
    arithmetic = flops / flops_per_ms if flops and flops_per_ms else 0.0
    return max(nbytes / bytes_per_ms, arithmetic)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 20)


def flusher(device: torch.device) -> Callable[[], None]:
    """A function after which nothing that is timed lies in a cache.

    It reads twice the largest cache. Writing instead would leave lines behind whose way to memory
    falls into the time of what comes next.
    """
    filler = torch.ones(2 * last_level_cache(device) // 4, device=device)
    return lambda: filler.sum()


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, as torch's allocator for GPUs does.

    A large result otherwise lies in new pages each time, and first touches of pages, not the
    operator, take much of the time: of every provider alike, but not of the copy. Cannot be undone
    in this process. Returns False where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
