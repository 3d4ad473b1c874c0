"""The CUDA kernels of the extension on the counting device: what a call of an operator starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.counting import build, extension, launches
from pgolf.extension import CUDA_VARIABLE

pytestmark = [
    pytest.mark.slow,  # the kernels are compiled once more
    pytest.mark.proves(
        "csrc", "pgolf/ops", "bench/counting", "tests/bench/counting_launches.py"
    ),
]

# What one call starts, in order; the product and the mean are torch's.
KERNELS = {
    "xsa": ["xsa_forward_rows"],
    "residual_norm": ["residual_norm_forward"],
    "qk_rope": ["qk_rope_forward"],
    "softcap_cross_entropy": ["softcap_cross_entropy_rows"],
    "weight_cast": ["weight_cast_rows"],
    "grad_norm": ["grad_norm_chunks", "grad_norm_finish"],
    "muon_momentum": ["muon_momentum_rows"],
    "param_update": ["param_update_chunks"],
    "part_sums": ["part_sums_columns"],
}
# The product; the losses of targets that are not ignored (a 0, and a choice), their
# sum, their count, the ratio.
TORCHS = {"softcap_cross_entropy": [*["aten"] * 7, "gemm"]}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    if missing := build.missing() or extension.missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("counting")
    environment = dict(build.environment(build.build(), folder))
    root = Path(__file__).parents[2]
    environment |= {CUDA_VARIABLE: str(extension.build()), "PYTHONPATH": str(root)}
    script = Path(__file__).with_name("counting_launches.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "log")],
        env=environment, capture_output=True, text=True, timeout=300,
        cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return launches.read(folder / "log")


@pytest.fixture(scope="module")
def phases(log):
    return launches.phases(log)


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_call_starts(phases, name):
    events = phases[name]
    kinds = [(launches.kind_of(e), e) for e in events]
    assert [launches.kernel_name(e) for kind, e in kinds if kind == "ours"] == KERNELS[name]
    others = sorted(kind for kind, _ in kinds if kind and kind != "ours")
    assert others == TORCHS.get(name, [])  # no copy, no memset
    assert not [e for e in events if e["kind"] == "wait"]
    launches.summarise(events, 0, 0)  # every kernel has its bytes


def test_launches_are_in_the_current_stream(log, phases):
    side = next(e["stream"] for e in log if e["kind"] == "stream")
    assert side
    streams = {e["stream"] for events in phases.values() for e in events if e["kind"] == "kernel"}
    assert streams == {side}


def moved(phases, name):
    return sum(e["bytes"] for e in phases[name] if e["kind"] == "compiled")


def test_bytes_of_launches(phases):
    """By hand, for the first sample of each operator in bf16."""
    assert moved(phases, "part_sums") == 2 * (5 * 7 + 70 * 8 + 33 + 7 + 8 + 33)
    numbers = (3 * 7, 4100, 1, 2 * 64, 8192)
    chunks = sum(-(-n // 4096) for n in numbers)
    assert moved(phases, "grad_norm") == 2 * sum(numbers) + 2 * 8 * chunks + 4 + 8
    shapes = ((8, 64), (8, 64), (40, 12), (3, 5))
    elements, rows = sum(r * c for r, c in shapes), sum(r for r, _ in shapes)
    # A gradient, its momentum twice, its direction; rows' squares, scalars, norm.
    assert moved(phases, "muon_momentum") == 2 * elements * 4 + 4 * rows + 4 * 10 + 4
