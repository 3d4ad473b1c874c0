"""Timing: interleaved rounds, medians, and the machine's own limits measured in the same rounds.

Everything that is compared runs once per round, each round in another order, so that drifting
clocks, other load, and the caches and free memory that one leaves to the next affect all equally.
"""

import ctypes
import functools
import gc
import random
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

WARM_UP = 2  # rounds that do not count
LEAST_ROUNDS = 3
# How long a GPU waits while the host queues the work to be timed: twice what the host takes, but
# not forever, if that waits for the GPU itself.
LONGEST_HEAD_START = 50.0  # ms
SLEEP_CYCLES = 20_000_000  # about 10 ms, to measure what a cycle is
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


class Clock(Protocol):
    """Runs something once, `run(state)`, and returns its milliseconds on a device."""

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float: ...


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
    """A clock of what `device` does."""
    return CudaClock() if device.type == "cuda" else _cpu_clock


def wall_clock_of(device: torch.device) -> Clock:
    """A clock of what takes the host along: from a device that is idle to one that is again."""
    return _cuda_wall_clock if device.type == "cuda" else _cpu_clock


def _cuda_wall_clock(run: Callable[[Any], Any], state: Any) -> float:
    def to_the_end(state: Any) -> Any:
        result = run(state)
        torch.cuda.synchronize()
        return result

    torch.cuda.synchronize()
    return _cpu_clock(to_the_end, state)


def _cpu_clock(run: Callable[[Any], Any], state: Any) -> float:
    started = time.perf_counter()
    result = run(state)
    spent = time.perf_counter() - started
    del result  # giving memory back is not on the clock
    return 1e3 * spent


class CudaClock:
    """Times the GPU, and not the host that queues the work.

    On an idle stream two events would time the host. So the GPU sleeps before the first of them,
    for twice as long as the host took to queue the same `run` in its last dry run: the first
    WARM_UP ones, without sleep. (What waits for the GPU inside cannot be queued ahead.)

    Attributes:
        host_ms: run -> least time that the host took for it.
    """

    def __init__(self) -> None:
        self.host_ms: MutableMapping[Callable, float] = WeakKeyDictionary()
        self._dry_ms: MutableMapping[Callable, list[float]] = WeakKeyDictionary()

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float:
        dry = self._dry_ms.setdefault(run, [])
        is_dry = len(dry) < WARM_UP
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if is_dry:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(int(self.head_start(run) * _cycles_per_ms()))
        start.record()
        began = time.perf_counter()
        result = run(state)
        host = 1e3 * (time.perf_counter() - began)
        end.record()
        end.synchronize()
        del result
        if is_dry:
            dry.append(host)
        self.host_ms[run] = min(host, self.host_ms.get(run, host))
        return start.elapsed_time(end)

    def head_start(self, run: Callable[[Any], Any]) -> float:
        """Milliseconds that the GPU sleeps before `run`."""
        return min(2 * self._dry_ms[run][-1], LONGEST_HEAD_START)


@functools.cache
def _cycles_per_ms() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(SLEEP_CYCLES)
    end.record()
    end.synchronize()
    return SLEEP_CYCLES / start.elapsed_time(end)


def host_ms(clock: Clock, entry: Entry) -> float | None:
    """Least time that the host took to queue an entry that a clock has timed; None on a CPU."""
    return clock.host_ms[entry.run] if isinstance(clock, CudaClock) else None


# --- the machine ----------------------------------------------------------------------------------


def copy_entry(nbytes: int, device: torch.device) -> Entry:
    """A copy that moves `nbytes` in all: half of them read, half of them written."""
    source = torch.full((max(nbytes // 2, 1),), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)  # its pages exist before the clock starts
    return Entry(lambda _: target.copy_(source))


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
