"""Each operator is compiled alone before a model is, by one helper that everything uses."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf.model import GPT
from pgolf.model.decode import Decoder
from pgolf.ops import compile as helper
from pgolf.ops.compile import Recorder, compile_graph
from pgolf.ops.operator import OPERATORS

from ..model.published import PUBLISHED, small
from ..triton.interpreter import repair

repair()

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def opaque_operators() -> set[str]:
    """Those that a model's graph may hold; of attention, which every layer has, nothing is long.

    Weights are cast into tensors that are there outside of graphs.
    """
    update = {name for name, operator in OPERATORS.items() if not operator.differentiable}
    others = ("attention", "weight_cast_into", "_", "name", *(update - {"part_sums"}))
    return {name for name in dir(torch.ops.pgolf) if not name.startswith(others)}


@pytest.fixture
def compiled(monkeypatch) -> list:
    """(function, the opaque operators in it) as they are compiled; nothing really is."""
    found = []

    def stand_in(function, *, fullgraph, dynamic, options=None):
        assert fullgraph and not dynamic
        if options is None:
            found.append((function, None))
            return function
        assert options == {"fx_graph_cache": False}, "Inductor meets nothing in a cached graph"

        def run() -> None:
            with Recorder() as recorder:
                function()
            found.append((function, {call[0]._opname for call in recorder.calls}))

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    helper._introduce.cache_clear()
    yield found
    helper._introduce.cache_clear()


def test_every_operator_is_compiled_before_the_first_model_and_never_again(compiled) -> None:
    for model in (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)):
        assert compile_graph(model, {"xsa": "cpu", "qk_rope": "reference"}, CPU) is model
    (alone, operators), *models = compiled
    assert operators == opaque_operators() and not hasattr(alone, "weight")
    assert [operators for _, operators in models] == [None, None]


def test_a_model_of_references_is_compiled_at_once(compiled) -> None:
    model = torch.nn.Linear(1, 1)
    compile_graph(model, {"xsa": "reference", "newton_schulz": "cpu"}, CPU)  # of the optimiser
    assert compiled == [(model, None)]


def test_decoding_compiles_operators_first(compiled) -> None:
    model = GPT(small(PUBLISHED["pr478"]), ops={"xsa": "cpu"}, max_length=4)
    decoder = Decoder(model, 1, 4, compiled=True)
    assert [function for function, _ in compiled[1:]] == [decoder._step]


def test_nothing_else_compiles() -> None:
    """Training, scoring, decoding and counting go through the helper.

    `bench ops` compiles single references, in which no operator is.
    """
    texts = {
        file.relative_to(ROOT).as_posix(): file.read_text()
        for folder in ("pgolf", "bench")
        for file in (ROOT / folder).rglob("*.py")
    }
    compiling = {
        name
        for name, text in texts.items()
        if "torch.compile(" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile"
    }
    assert compiling == {"pgolf/ops/compile.py", "bench/providers.py"}
    assert {name for name, text in texts.items() if "compile_graph(" in text} == {
        "bench/counting/worker.py", "bench/matrix_model.py", "pgolf/model/decode.py",
        "pgolf/ops/compile.py", "pgolf/scoring/job.py", "pgolf/training/trainer.py",
    }  # fmt: skip


MEETING = """
import torch
from pgolf.model import GPT
from pgolf.ops.compile import _introduce
from torch._inductor.lowering import lowerings

def met():
    known = (o for o in lowerings if isinstance(o, torch._ops.OpOverload))
    return {o._opname for o in known if o.namespace == "pgolf"}

assert not met()
_introduce("cpu")
print(*met())
"""


@pytest.mark.slow
def test_inductor_meets_every_operator_also_where_its_cache_is_full(tmp_path: Path) -> None:
    """In two processes that share the cache on disk."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", MEETING], capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) == opaque_operators()
