"""The emulator of CUDA on the kernels of rules.cu: what it computes, and what it refuses."""

import ctypes
import re
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from . import emulator
from .emulator import HERE, Build, Missing, compiler

LANES = np.arange(32)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    try:
        path = Build([HERE / "rules.cu"], [], tmp_path_factory.mktemp("rules")).run()
    except Missing as missing:
        pytest.skip(str(missing))
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["0", "1", "2", "3"])
def seed(request, monkeypatch) -> str:
    monkeypatch.setenv("PGOLF_EMULATOR_SEED", request.param)
    return request.param


def start(library, name, grid=(1, 1, 1), block=(32, 1, 1), shared=0, size=192):
    """(the numbers that the kernel wrote, what was said about it)"""
    out = np.full(size + 4, -1, np.int32)
    out = out[(-out.ctypes.data // 4) % 4 :][:size]  # aligned to 16 bytes
    three = ctypes.c_uint * 3
    said = ctypes.create_string_buffer(500)
    pointer, bytes_shared = out.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(shared)
    sizes = three(*grid), three(*block), bytes_shared
    library.start(name.encode(), *sizes, pointer, said, ctypes.c_size_t(499))
    return out, said.value.decode()


@pytest.mark.usefixtures("seed")
def test_barriers_and_sums(library) -> None:
    out, said = start(library, "sum_of_block", grid=(3, 1, 1), block=(64, 1, 1))
    assert said == "" and out[:3].tolist() == [2016] * 3 and (out[3:] == -1).all()


@pytest.mark.usefixtures("seed")
def test_shuffles_and_votes(library) -> None:
    out, said = start(library, "shuffles")
    assert said == ""
    first = LANES // 8 * 8
    by_xor = LANES ^ 9
    wanted = [
        first + (LANES + 1) % 8,
        np.where(LANES % 16 < 3, LANES, LANES - 3),
        np.where(LANES % 16 > 12, LANES, LANES + 3),
        np.where(by_xor > first + 7, LANES, by_xor),  # later groups of lanes are out of reach
        np.full(32, sum(1 << lane for lane in range(0, 32, 3))),
        np.full(32, 1),
    ]
    assert out.reshape(6, 32).tolist() == [w.tolist() for w in wanted]


@pytest.mark.usefixtures("seed")
def test_groups_of_lanes_do_not_wait_for_each_other(library) -> None:
    out, said = start(library, "groups")
    wanted = LANES.copy()
    for group in range(4):
        for _ in range(group):
            wanted[8 * group : 8 * group + 8] = wanted[8 * group : 8 * group + 8].sum()
    assert said == "" and out[:32].tolist() == wanted.tolist()


@pytest.mark.usefixtures("seed")
def test_a_block_finds_nothing_that_another_left(library) -> None:
    out, said = start(library, "left_in_shared_memory", (5, 1, 1), (1, 1, 1), shared=16)
    assert said == "" and (out[:10] == -1).all()  # 0xFFFFFFFF


def test_every_block_and_thread_in_three_dimensions(library) -> None:
    out, said = start(library, "places", (2, 2, 2), (4, 3, 2))
    assert said == ""
    assert out.tolist() == [100 * block + thread for block in range(8) for thread in range(24)]


def test_the_seed_chooses_the_order_of_threads(library, monkeypatch) -> None:
    orders = []
    for seed in ("0", "1", "2", "2", "3"):
        monkeypatch.setenv("PGOLF_EMULATOR_SEED", seed)
        out, said = start(library, "order", block=(96, 1, 1))
        assert said == "" and sorted(out[:96]) == list(range(96))
        orders.append(out[:96].tolist())
    assert orders[0] == list(range(96)) and orders[1] == list(reversed(range(96)))
    assert orders[2] == orders[3] != orders[4] and orders[2] not in orders[:2]


def test_a_missing_barrier_shows(library, seed) -> None:
    out, said = start(library, "no_barrier", block=(64, 1, 1))
    assert said == "" and (out[:64] == -1).any()


BROKEN = {
    "barrier_after_return": r"__syncthreads at rules.cu:\d+: thread \(5, 0, 0\) has returned",
    "diverged_barriers": r"thread \(32, 0, 0\) waits for __syncthreads at rules.cu:\d+",
    "lane_that_has_returned": r"__shfl_xor_sync at rules.cu:\d+ with mask 0xf+: lane 3 has ret",
    "lane_at_a_barrier": r"__syncwarp .*: lane 3 waits for __syncthreads at rules.cu:\d+",
    "mask_without_itself": r"__shfl_sync .* with mask 0x1: the mask does not name this lane",
    "inactive_source": r"__shfl_down_sync .* mask 0xf: reads lane 4, which the mask does not name",
    "odd_width": r"__shfl_sync at rules.cu:\d+ .*: the width 12 is no power of two up to 32",
    "different_masks": r"__syncwarp .*: other lanes wait for __syncwarp at rules.cu:\d+ with mask",
    "different_collectives": r"other lanes wait for (a vote|__shfl_sync) at rules.cu:\d+ with",
    "misaligned": r"rules.cu:\d+: an address \(\d+ modulo 256\) that is not aligned to 16 bytes",
    "index_outside": r"rules.cu:\d+: the index 32 lies outside of the array",
}


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_an_error_that_names_kernel_block_and_thread(library, name) -> None:
    block = (64 if "barrier" in name else 32, 1, 1)
    _, said = start(library, name, block=block)
    assert re.search(BROKEN[name], said), said
    assert f"[kernel {name}, block (0, 0, 0), thread (" in said
    out, said = start(library, "sum_of_block", block=(64, 1, 1))
    assert said == "" and out[0] == 2016, "the next launch is a fresh one"


def test_lanes_beyond_the_block_do_not_exist(library) -> None:
    _, said = start(library, "shuffles", block=(20, 1, 1))
    assert "lane 20 does not exist in this block" in said


@pytest.mark.parametrize(
    ("grid", "block", "shared", "said"),
    [
        ((0, 1, 1), (32, 1, 1), 0, "invalid configuration argument"),
        ((1, 0, 1), (32, 1, 1), 0, "invalid configuration argument"),
        ((1, 65536, 1), (32, 1, 1), 0, "invalid configuration argument"),
        ((1 << 31, 1, 1), (32, 1, 1), 0, "invalid configuration argument"),
        ((1, 1, 1), (0, 1, 1), 0, "invalid configuration argument"),
        ((1, 1, 1), (1025, 1, 1), 0, "invalid configuration argument"),
        ((1, 1, 1), (32, 33, 1), 0, "invalid configuration argument"),
        ((1, 1, 1), (1, 1, 65), 0, "invalid configuration argument"),
        ((1, 1, 1), (32, 1, 1), 49153, "invalid argument"),
    ],
)
def test_launches_that_cuda_refuses(library, grid, block, shared, said) -> None:
    out, answer = start(library, "places", grid, block, shared)
    assert answer == said and (out == -1).all()


def test_the_largest_launches(library) -> None:
    assert start(library, "barrier_after_return", block=(5, 1, 1), shared=49152)[1] == ""
    assert "thread (5, 0, 0)" in start(library, "barrier_after_return", block=(1024, 1, 1))[1]


def test_few_multiprocessors(library) -> None:
    assert library.multiprocessors() == 4


def test_several_threads_launch_at_once(library) -> None:
    answers = []

    def work() -> None:
        for _ in range(20):
            out, said = start(library, "sum_of_block", (7, 1, 1), (64, 1, 1))
            answers.append(said == "" and out[:7].tolist() == [2016] * 7)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 80


def test_parameters_that_cuda_does_not_take_do_not_compile(tmp_path) -> None:
    """As with nvcc."""
    for size, compiles in ((32764, True), (32768, False)):
        source = tmp_path / "big.cu"
        source.write_text(
            f"#include <cuda_runtime.h>\nstruct Big {{ int at[{size // 4}]; }};\n"
            "__global__ void kernel(Big) {}\n"
            "cudaError_t f(const cudaLaunchConfig_t* c, const Big& big) "
            "{ return cudaLaunchKernelEx(c, kernel, big); }\n"
        )
        command = [*compiler(), "-x", "c++", "-std=c++17", f"-I{HERE / 'include'}"]
        result = subprocess.run(
            [*command, "-fsyntax-only", str(source)], capture_output=True, text=True
        )
        assert (result.returncode == 0) == compiles, result.stderr
        assert compiles or "at most 32,764 bytes of parameters" in result.stderr


def test_processes_that_want_the_module_at_once_build_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "ROOT", tmp_path)
    monkeypatch.setattr(emulator, "_content", lambda: "hash")
    with pytest.raises(Missing, match="not built yet: python -m tests.simt.emulator"):
        emulator.emulated_module(build=False)
    assert not list(tmp_path.iterdir())
    events = []

    def run() -> Path:
        events.append("begin")
        time.sleep(0.05)
        events.append("end")
        (tmp_path / "library").write_text("")
        return tmp_path / "library"

    build = SimpleNamespace(run=run)
    monkeypatch.setattr(emulator, "pgolf_build", lambda folder: build)
    threads = [threading.Thread(target=emulator.emulated_module) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == ["begin", "end"], "the second finds what the first has built"
    module = tmp_path / "build" / "emulated-hash" / "_C.so"
    assert emulator.emulated_module(build=False) == module and module.exists()
