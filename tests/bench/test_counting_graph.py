"""Captures of the counting device: replayed work is that of the eager turn, misuse is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.counting import build, launches

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "there is one")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counting")
    script, root = Path(__file__).with_name("counting_graph.py"), Path(__file__).parents[2]
    environment = {**build.environment(build.build(), folder), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "log")],
        env=environment, capture_output=True, text=True, timeout=300, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return launches.read(folder / "log")


@pytest.fixture(scope="module")
def told(log):
    return next(e for e in log if e["kind"] == "told")


@pytest.fixture(scope="module")
def phases(log):
    return launches.phases(log)


def works(events):
    return [e for e in events if launches.kind_of(e)]


def test_a_replay_is_the_eager_turn(phases, told):
    """Launch by launch; the turn's own tensors lie in the graph's pool, others where they did."""
    eager, (graph, *replayed) = works(phases["eager"]), phases["replay"]
    assert graph["kind"] == "graph" and graph["works"] == len(replayed) == len(eager) > 5
    place = {"arguments", "stream"}
    names: dict[int, int] = {}
    for before, after in zip(eager, replayed, strict=True):
        assert {k: v for k, v in before.items() if k not in place} == {
            k: v for k, v in after.items() if k not in place
        }
        for one, other in zip(before.get("arguments", []), after.get("arguments", []), strict=True):
            if one != other:
                assert names.setdefault(one, other) == other
                assert any(start <= other < end for start, end in told["pool"]), before
    kinds = {e["kind"] for e in replayed}
    assert names and kinds >= {"kernel", "gemm", "attention", "memcpy_to_device"}
    assert len({e["stream"] for e in eager}) == 1
    assert {e["stream"] for e in replayed} == {0}


def test_a_capture_runs_nothing(phases):
    assert not works(phases["capture"])
    assert all(e["kind"] == "wait" for e in phases["capture"])  # before it began


def test_a_replay_copies_what_is_there_then(told):
    assert told["copied"] == [3.0, 3.0]


def test_triton_kernels_have_their_arguments(phases):
    launched = [e for e in phases["replay"] if e.get("api") == "driver"]
    assert launched and all(e["arguments"][0] > 1 << 20 for e in launched)


@pytest.mark.parametrize(
    "what, said",
    [
        ("joined", ""),
        ("unjoined", "cudaStreamEndCapture in a capture: a stream that joined it is not waited"),
        ("wait", "cudaStreamSynchronize in a capture: the host may not wait"),
        ("synchronize", "cudaDeviceSynchronize in a capture: the host may not wait"),
        ("pageable", "cudaMemcpyAsync in a capture: of host memory that is not page-locked"),
        ("query", "cudaEventQuery in a capture: it is not allowed there"),
        ("legacy stream", "in a capture: it is on the legacy stream"),
        ("allocation", "cudaMalloc in a capture: it is not allowed there"),
        ("after all", ""),
    ],
)
def test_misuse(told, what, said):
    found = told["said"][what]
    assert said in found if said else found == "", found
