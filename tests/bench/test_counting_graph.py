"""Captures of the counting device: replayed work is that of the eager turn, misuse is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.counting import build, launches, replay

needs_device = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "there is one")


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


@needs_device
def test_a_replay_is_the_eager_turn(phases, told):
    """Launch by launch; the turn's own tensors lie in the graph's pool, others where they did."""
    eager, replayed = phases["eager"], phases["replay"]
    kept = [told["x"]]
    assert replay.compare(eager, replayed, told["pool"], kept, 0) > 10
    graph, *others = replayed
    assert graph["kind"] == "graph" and graph["works"] == len(others) == len(works(eager))
    assert {e["kind"] for e in others} >= {"kernel", "gemm", "attention", "memcpy_to_device"}
    assert len({e["stream"] for e in works(eager)}) == 1 and {e["stream"] for e in others} == {0}
    with pytest.raises(launches.CountingError, match="goes to"):
        replay.compare(eager, replayed, told["pool"][:0], kept, 0)


def kernel(*arguments, name="k"):
    return {"kind": "kernel", "api": "driver", "name": name, "arguments": [*arguments]}


GRAPH, SENT = {"kind": "graph"}, {"kind": "memcpy_to_device", "arguments": [1, 2]}


def test_steps_that_differ():
    own, kept = [(100, 200)], [(10, 20)]
    eager = [kernel(15), SENT, kernel(7, name="cast"), kernel(50, 15)]
    replayed = [SENT, kernel(9, name="copy"), GRAPH, kernel(15), kernel(150, 15)]
    assert replay.compare(eager, replayed, own, kept, 1) == 3
    for fault, said in (
        (replayed[:-1], "1 launches in graphs, 2 in an eager step"),
        (replayed[:3], "0 launches in graphs"),
        ([*replayed[:4], kernel(150, 15, name="l")], "a graph launches"),
        ([*replayed[:-1], kernel(50, 115)], "goes to 0x73 in a graph, and to 0xf"),  # what is kept
        ([*replayed[:-1], kernel(60, 15)], "goes to 0x3c in a graph"),  # nobody's
        ([*replayed[:-1], {**kernel(150, 15), "grid": [2, 1, 1]}], "'grid'"),
    ):
        with pytest.raises(launches.CountingError, match=said):
            replay.compare(eager, fault, own, kept, 1)


@needs_device
def test_a_capture_runs_nothing(phases):
    assert not works(phases["capture"])
    assert all(e["kind"] == "wait" for e in phases["capture"])  # before it began


@needs_device
def test_a_replay_copies_what_is_there_then(told):
    assert told["copied"] == [3.0, 3.0]


@needs_device
def test_triton_kernels_have_their_arguments(phases):
    launched = [e for e in phases["replay"] if e.get("api") == "driver"]
    assert launched and all(e["arguments"][0] > 1 << 20 for e in launched)


@needs_device
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
    message = told["said"][what]
    assert said in message if said else message == "", message
