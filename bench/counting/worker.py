"""The process that is counted: training or decoding steps of a model on the counting device.

    bench.counting.worker REQUEST.json ANSWER.json    (started by `run`, with `build.environment`)

Weights stay uninitialised and inputs are zeros: nothing is computed. The first step compiles, the
next ones are counted and must be the same.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.counting.launches import CountingError
from pgolf.child import run_module

STEPS = 3


@dataclass(frozen=True)
class Request:
    """What to count.

    Attributes:
        recipe: its name.
        overrides: settings of the recipe that differ.
        ops: operators as ops= of a run names them. Attention is the stand-in for FlashAttention 3
            with any.
        sequences, tokens: of one pass.
        qat: whether block matrices pass through fake-quant, switched off, as for late QAT.
        compiled: under torch.compile(fullgraph=True, dynamic=False), or eagerly.
        decode: not a training step, but one more token of each sequence, the last of `tokens`.
        turn: a whole turn of the training loop, as `bench.counting.turn` counts it.
        world: ranks of that loop.
        graphs: whether it replays CUDA graphs.
    """

    recipe: str = "pr1473"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    ops: str = "reference"
    sequences: int = 48
    tokens: int = 2048
    qat: bool = False
    compiled: bool = True
    decode: bool = False
    turn: bool = False
    world: int = 1
    graphs: bool = False


def run(request: Request, environment: Mapping[str, str]) -> dict[str, Any]:
    """Count in a process of its own; see `count` for the result.

    Args:
        environment: from `build.environment`.

    Raises:
        CountingError: it failed; with the last lines of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        module = "bench.counting.turn" if request.turn else "bench.counting.worker"
        done = run_module(module, str(asked), str(answer), env=environment, capture_output=True)
        if done.returncode or not answer.exists():
            output = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise CountingError(f"counting {request} failed with code {done.returncode}:\n{output}")
        return json.loads(answer.read_text(encoding="utf-8"))


def build_model(request: Request) -> tuple[Any, Any, dict[str, str]]:
    """(config, model, choices of operators) as `pgolf train` makes them, with empty weights."""
    import torch

    from pgolf import recipes
    from pgolf.model import GPT
    from pgolf.model.gpt import operator_sizes
    from pgolf.ops.choose import choose_all
    from pgolf.training.late_qat import LateQat

    config = recipes.get(request.recipe).config({"seq_len": request.tokens, **request.overrides})
    torch.set_float32_matmul_precision("high")
    sizes = operator_sizes(config.model, torch.bfloat16, torch.bfloat16)
    text = f"{request.ops},attention=fa3"  # of what contradicts itself the last counts
    chosen = choose_all(text, "cuda", torch.bfloat16, False, sizes)
    choices = {name: choice.impl for name, choice in chosen.items()}
    model = GPT(config.model, torch.bfloat16, config.data.seq_len, choices).to("cuda")
    if request.qat:
        LateQat(model, config, torch.device("cuda"))
    return config, model, choices


def _training(request: Request) -> tuple[dict[str, Callable[[], None]], dict]:
    """The phases of a training step, in order, and what to add to their counts: nothing."""
    import torch

    from pgolf.ops.compile import compile_graph
    from pgolf.optim.exchange import Exchange
    from pgolf.optim.groups import Optimizers
    from pgolf.ranks import Ranks

    config, model, choices = build_model(request)
    exchange = Exchange(model, Ranks(0, 1, torch.device("cuda")), 1, choices)
    optimizers = Optimizers(model, config.optim, choices)
    ids = torch.zeros(request.sequences, request.tokens, dtype=torch.int64, device="cuda")
    step = compile_graph(model, model.ops, ids.device) if request.compiled else model
    kept = {}  # a loss lives until the next one, as in the trainer's loop
    one = torch.ones((), device=ids.device)

    def update() -> None:
        optimizers.step(*exchange.reduce(), 1.0, 0.9)
        exchange.publish()

    return {
        "forward": lambda: kept.update(loss=step(ids, ids)),
        "backward": lambda: kept["loss"].backward(one),
        "optimizer": update,
    }, {}


def _decoding(request: Request) -> tuple[dict[str, Callable[[], None]], dict]:
    """The phases of a decoded token, the model and drawing from its logits, and the least bytes.

    Of tables only a few rows are read: they are left out, but for the one that gives the logits.
    """
    import torch

    from pgolf.model.decode import WINDOW, Decoder, pick
    from pgolf.model.embeddings import Table
    from pgolf.model.frozen import frozen_copy

    _, model, _ = build_model(request)
    model = frozen_copy(model, ops=model.ops)
    decoder = Decoder(model, request.sequences, request.tokens, request.compiled)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, Table)}
    read = [p for p in model.parameters() if id(p) not in tables] + [model.head_weight]
    least = {
        "weights": sum(p.nbytes for p in read),
        "caches": sum(t.nbytes for t in (*decoder.keys, *decoder.values)),
    }
    ids = torch.zeros(request.sequences, dtype=torch.int64, device="cuda")
    chance = torch.zeros(request.sequences, dtype=torch.float64, device="cuda")
    decoder.read(ids[:, None].expand(-1, WINDOW))  # steps after it are all alike
    logits = []

    def step() -> None:
        decoder.used = request.tokens - 1  # every step is that of the last token
        logits.append(decoder.step(ids))

    return {"step": step, "pick": lambda: pick(logits.pop(), 0.8, chance)}, {
        "step": {"least_bytes": least}
    }


def count(request: Request, log: Path) -> dict[str, Any]:
    """Counts of a step by phase, and what compiled it.

    Returns:
        'phases': phase -> `launches.summarise`; 'graphs': what Inductor compiled; 'versions'.

    Raises:
        CountingError: two steps differ, or a launch has no bytes.
    """
    import torch
    import triton

    from bench.counting import attention, inductor, launches
    from bench.counting.client import Device
    from bench.counting.eager import Counted, operators_counted

    # torch's library is loaded: compilers that are started from here on need no stand-in.
    os.environ.pop("LD_PRELOAD", None)
    device = Device(log)
    attention.install(device)
    phases, extra = _decoding(request) if request.decode else _training(request)
    compiled = next(iter(phases))  # the phase that torch.compile is called in
    peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(name: str, number: int):
        torch.cuda.reset_peak_memory_stats()
        device.note(kind="phase", name=f"{name} {number}")
        # torch.compile refuses to enter a compiled forward pass under a mode.
        closed = request.compiled and (name == compiled or not number)
        with contextlib.nullcontext() if closed else Counted(device):
            yield
        device.note(kind="phase", name="")
        peaks[f"{name} {number}"] = torch.cuda.max_memory_allocated()

    with inductor.recorded() as graphs, operators_counted(device):
        for number in range(STEPS):
            for name, work in phases.items():
                with phase(name, number):
                    work()
    device.close()

    expected = (1 if request.decode else 2) * request.compiled
    if len(graphs) != expected:
        raise CountingError(f"Inductor compiled {len(graphs)} graphs, not {expected}")
    inductor_bytes = {("backward" if g.backward else compiled): g.bytes for g in graphs}
    events = launches.phases(launches.read(log))
    counted = [
        {
            name: {
                **launches.summarise(
                    events[f"{name} {number}"], inductor_bytes.get(name, 0),
                    peaks[f"{name} {number}"],
                ),
                **extra.get(name, {}),
            }
            for name in phases
        }
        for number in range(1, STEPS)
    ]
    if any(c != counted[-1] for c in counted):
        raise CountingError("two steps after the first differ: nothing steady to count")
    return {
        "device": device.name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "phases": counted[-1],
        "graphs": [asdict(graph) for graph in graphs],
    }


if __name__ == "__main__":
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        result = count(request, Path(folder) / "log.jsonl")
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
