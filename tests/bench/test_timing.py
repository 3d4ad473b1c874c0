"""How benchmarks time: rounds, clocks, and the limits of a machine."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import cases, products, timing

from .test_ops import CPU, toy


def test_everything_runs_once_a_round_and_after_every_other_alike() -> None:
    calls: list[str] = []
    entries = {n: timing.Entry(lambda _, n=n: calls.append(n)) for n in "abcd"}
    times = timing.interleave(entries, 600, lambda run, state: run(state) or 1.0)
    assert times == {n: [1.0] * 600 for n in "abcd"}
    counted = calls[4 * timing.WARM_UP :]
    rounds = ["".join(counted[i : i + 4]) for i in range(0, len(counted), 4)]
    assert len(rounds) == 600 and all(sorted(one) == list("abcd") for one in rounds)
    pairs = Counter(one[i : i + 2] for one in rounds for i in range(3))
    assert len(pairs) == 12 and min(pairs.values()) > 100  # 150 each, if all were alike
    assert min(Counter(one[0] for one in rounds).values()) > 110
    assert [timing.shuffled("abcd", 7) for _ in range(2)] == [timing.shuffled("abcd", 7)] * 2


def test_preparation_and_flushing_are_off_the_clock() -> None:
    log: list[str] = []

    def clock(run: Callable, state: Any) -> float:
        log.append("start")
        run(state)
        log.append("stop")
        return 0.0

    entry = timing.Entry(lambda state: log.append(state), prepare=lambda: log.append("p") or "run")
    timing.interleave({"a": entry}, 1, clock, before=lambda: log.append("flush"))
    assert log == ["p", "flush", "start", "run", "stop"] * (timing.WARM_UP + 1)


def test_fewer_rounds_if_time_is_short() -> None:
    assert timing._affordable(50, round_seconds=0.1, seconds=5.0) == 50
    assert timing._affordable(50, round_seconds=0.1, seconds=1.05) == 10
    assert timing._affordable(50, round_seconds=2.0, seconds=5.0) == 0
    entry = timing.Entry(lambda _: None)
    assert timing.interleave({"a": entry}, 5, lambda *_: 1.0, seconds=0.0) == {}
    assert timing.interleave({"a": entry}, 5, lambda *_: 1.0, seconds=9.0) == {"a": [1.0] * 5}


def test_percentiles_are_interpolated() -> None:
    assert timing.summarise([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert timing.summarise([7.0]) == (7.0, 7.0, 7.0)


def test_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    assert timing.floor_ms(1000, 0, bytes_per_ms=100.0, flops_per_ms=None) == 10.0
    assert timing.floor_ms(1000, 600, bytes_per_ms=100.0, flops_per_ms=50.0) == 12.0
    assert timing.floor_ms(1000, 400, bytes_per_ms=100.0, flops_per_ms=50.0) == 10.0


def test_limits_are_those_of_real_work() -> None:
    entry = timing.copy_entry(1000, CPU)
    assert entry.run(None).nbytes == 500  # read once and written once
    assert timing.last_level_cache(CPU) >= 1 << 18


def test_the_ceiling_of_arithmetic_is_the_reference_s_own_matmuls() -> None:
    case = cases.build(toy(), toy().samples()[0], CPU, "fp32")
    forward, backward = (case.products(mode) for mode in ("forward", "backward"))
    shapes = {tuple(f.shape for f in product): n for product, n in forward.items()}
    assert shapes == {((33, 8), (8, 33)): 1, ((8, 33), (33, 33)): 1}
    assert sum(backward.values()) == 4 and case.products("both") == forward + backward
    transposed = next(p for p in forward if p.left.shape == (33, 8))
    assert transposed.left.stride == (1, 33) and transposed.left.drawn(CPU).stride() == (1, 33)
    run, flops = products.entry(forward + forward, CPU)
    assert flops == 2 * 2 * (2 * 8 * 33 * 33)
    assert products.products_in(lambda: run.run(None)) == forward + forward


class Gpu:
    """What CudaClock calls of torch.cuda, with a host that the test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept, self.log = 0.0, [], []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "_cycles_per_ms", lambda: 1000.0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)

    def record(self) -> None:
        self.log.append("event")

    def synchronize(self) -> None:
        self.log.append("end")

    def elapsed_time(self, other: "Gpu") -> float:
        return 7.0

    def takes(self, milliseconds: float) -> Callable:
        def run(state: Any) -> None:
            self.now += milliseconds / 1e3

        return run


def test_a_gpu_sleeps_while_the_host_queues_what_is_timed(monkeypatch) -> None:
    gpu = Gpu(monkeypatch)
    clock, short, long = timing.CudaClock(), gpu.takes(0.4), gpu.takes(900)
    times = timing.interleave({"short": timing.Entry(short)}, 3, clock)
    assert times == {"short": [7.0] * 3}
    assert gpu.slept == pytest.approx([800] * 3), "twice the host's time, and not in dry runs"
    assert gpu.log[:4] == ["wait", "event", "event", "end"]
    assert timing.host_ms(clock, timing.Entry(short)) == pytest.approx(0.4)
    timing.interleave({"long": timing.Entry(long)}, 1, clock)
    assert gpu.slept[3:] == [1000 * timing.LONGEST_HEAD_START]
    assert timing.host_ms(timing.clock_of(CPU), timing.Entry(short)) is None


def test_cpu_clock_measures_the_run_alone() -> None:
    state = torch.ones(3)
    spent = timing.clock_of(CPU)(lambda s: s.add_(1), state)
    assert 0 < spent < 1e4 and state.tolist() == [2.0, 2.0, 2.0]
