"""Threads of pgolf._C's CPU kernels: same results for any number, in forks, asleep when idle."""

import os
import threading
import time

import pytest
import torch
from torch import Tensor

from . import cpu_kernels as call
from .cpu_kernels import digest, randn, samples


def test_any_number_of_threads_gives_the_same_bits(kernels):
    alone = digest(samples(kernels, 1))
    assert digest(samples(kernels, 2)) == digest(samples(kernels, 5)) == alone


def test_the_child_of_a_fork_has_threads(kernels):
    y, v = randn(1, 2000, 8, 64), randn(1, 2000, 4, 64)
    expected = call.xsa(kernels, y, v, threads=3).numpy().tobytes()
    child = os.fork()
    if child == 0:  # nothing of torch that uses its threads: those are gone
        right = call_without_torch(kernels, y, v) == expected
        tasks = "/proc/self/task"  # Linux only
        right &= not os.path.isdir(tasks) or len(os.listdir(tasks)) > 1
        os._exit(0 if right else 1)
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0
    assert call.xsa(kernels, y, v, threads=3).numpy().tobytes() == expected


def call_without_torch(kernels, y: Tensor, v: Tensor) -> bytes:
    z = bytearray(y.numel() * 4)
    address = torch.frombuffer(z, dtype=torch.float32).data_ptr()
    kernels.xsa(
        *(y.data_ptr(), v.data_ptr(), address, 0, *y.shape[:3], v.size(2), y.size(3)),
        *(call.strides(y), call.strides(v), 3),
    )
    return bytes(z)


def test_callers_on_several_threads(kernels):
    y, v = randn(1, 2000, 8, 64), randn(1, 2000, 4, 64)
    expected = call.xsa(kernels, y, v)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(call.xsa(kernels, y, v, threads=2), expected):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_waiting_threads_sleep(kernels):
    samples(kernels, 4)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
