"""The process that runs whole turns of the training loop on the counting device.

    bench.counting.turn REQUEST.json ANSWER.json    (as bench.counting.worker)

`pgolf train`'s own loop goes round, as rank 0 of a world whose other ranks are not there: torch's
fake process group takes collectives and does nothing. What is counted is what one turn does besides
the arithmetic: launches, waits of the host, copies, allocations, collectives, the host's CPU time.
With graphs all of a turn is `rest`, and what they launch has to be what an eager step does.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bench.counting import replay
from bench.counting.launches import CountingError, gemm_name, kernel_name, kind_of, phases, read
from bench.counting.worker import Request, build_model

STEPS = 10_000  # of the run, whose last ones go round: weights are averaged by then
TURNS = 14
CASTS = 2  # launches that make tokens of what was read, before any graph
COUNTED = (6, 7)  # two in the middle, which have to be alike
# The wait for the step before the last but one: it keeps the host from running away, and on a GPU
# that is the bottleneck it is what the host does all day.
PACING = "cudaEventSynchronize"
# Of the names in that of a kernel of torch's, those that say what it does.
_TELLS = re.compile("(?i)^(?!gpu_kernel).*(kernel|copy|functor|ops|cleanup)")


class _Log:
    """Notes where the host is, and how much CPU time it spent there."""

    def __init__(self, device: Any):
        self.device, self.turn = device, 0
        self.name, self.since = "", time.process_time_ns()
        self.milliseconds: Counter[tuple[int, str]] = Counter()

    def enter(self, name: str) -> str:
        """From now on the host is there; returns where it was."""
        now, before = time.process_time_ns(), self.name
        self.milliseconds[self.turn, before] += (now - self.since) / 1e6
        self.device.note(kind="phase", name=f"{name} {self.turn}")
        # what the note itself costs is nobody's
        self.name, self.since = name, time.process_time_ns()
        return before

    def inside(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(name)
            result = function(*args, **kwargs)
            self.enter(before)
            return result

        return call


@contextmanager
def _ranks(world: int, device: Any) -> Iterator[Any]:
    """Rank 0 of so many, on the counting device; collectives are noted."""
    import torch
    import torch.distributed as dist

    from pgolf import ranks

    def noted(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            # the first tensor on the GPU is the whole that is exchanged; the host's go over gloo
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            event = dict(name=name, bytes=max(t.nbytes for t in tensors))
            if tensors[0].is_cuda:
                device.work(kind="collective", **event)
            else:
                device.note(kind="control", **event)
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        if world > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
            stack.callback(dist.destroy_process_group)
            places = [(dist, name, name) for name in ("all_reduce", "all_gather", "broadcast")]
            ours = ("reduce_scatter", "all_gather")
            places += [(ranks, f"_{name.upper()}", name) for name in ours]
            for module, attribute, name in places:
                call = noted(name, getattr(module, attribute))
                stack.enter_context(mock.patch.object(module, attribute, call))
        yield ranks.Ranks(0, world, torch.device("cuda"))


def _trainer(request: Request, folder: Path, ranks: Any) -> Any:
    """A trainer of made-up tokens, with TURNS steps to go and nothing between them."""
    import numpy as np

    from pgolf.config import with_overrides
    from pgolf.data.loader import Loader
    from pgolf.data.shards import write_shard
    from pgolf.optim.schedule import Clock
    from pgolf.training.session import Session
    from pgolf.training.trainer import Trainer

    config, model, choices = build_model(replace(request, qat=False))  # the trainer's business
    passes = request.sequences * request.tokens
    config = with_overrides(config, {
        "batch_tokens": passes * ranks.world, "micro_tokens": passes, "max_steps": STEPS,
        "max_tokens": 0, "max_seconds": 0, "val_every": 0, "checkpoint_every": 0,
        "log_every": 1000, "compile": "on" if request.compiled else "off",
        # counted turns are those before late QAT, or after it
        "qat_start": 0.0 if request.qat else 1.0, "device": "cuda",
        "graphs": str(request.graphs).lower(),
    })  # fmt: skip
    shard = folder / "counted_train_000000.bin"
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, 4 * passes + 4)
    write_shard(shard, tokens)
    loader = Loader([shard], ranks, config.model.vocab_size, request.tokens, passes)
    run_folder = SimpleNamespace(log=lambda **line: None, checkpoints=lambda: [], path=folder)
    session = Session(config, ranks, None, run_folder)
    trainer = Trainer(session, model, loader, None, None, choices)
    trainer.clock = Clock(STEPS - TURNS, 0, 1.0)
    return trainer


def count_turn(request: Request, log: Path, folder: Path) -> dict[str, Any]:
    """What one turn of the loop does.

    Raises:
        CountingError: two turns differ.
    """
    import torch

    from bench.counting import attention
    from bench.counting.client import Device
    from pgolf.training.graphs import captures

    os.environ.pop("LD_PRELOAD", None)
    device = Device(log)
    attention.install(device)
    memory: dict[int, tuple[int, int]] = {}
    with ExitStack() as stack:
        ranks = stack.enter_context(_ranks(request.world, device))
        trainer = _trainer(request, folder, ranks)
        capturing = stack.enter_context(captures(trainer))
        trainer.warm_up()
        check = _beside_eager(device, trainer) if request.graphs else None
        stack.enter_context(capturing)
        addresses = check() if check else None
        notes = _Log(device)
        queue_step = trainer._queue_step

        def next_turn(*args: Any) -> None:
            allocated = torch.cuda.memory_stats()["num_device_alloc"]
            pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
            notes.turn += 1
            memory[notes.turn] = (allocated, pinned)
            notes.enter("rest")
            queue_step(*args)

        trainer._queue_step = next_turn
        trainer.validate = lambda: None
        trainer.forward = notes.inside("forward", trainer.forward)
        backward = notes.inside("backward", torch.Tensor.backward)
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        trainer.train(SimpleNamespace(number=0))
        notes.enter("end")
    device.close()

    events = phases(read(log))
    same = addresses and replay.compare(events["eager"], events["replayed"], *addresses, CASTS)
    counted = [_turn(events, n, memory) for n in COUNTED]
    if counted[0] != counted[1]:
        raise CountingError(f"two turns differ: {counted}")
    turns, parts = range(2, TURNS - 2), ("forward", "backward", "rest")
    spent = {where: min(notes.milliseconds[n, where] for n in turns) for where in parts}
    spent["turn"] = min(sum(notes.milliseconds[n, where] for where in parts) for n in turns)
    return {
        "device": device.name,
        "versions": _versions(),
        "phases": {
            "turn": counted[0]
            | ({"addresses_compared": same} if request.graphs else {})
            | {"host_ms": {k: round(v, 2) for k, v in spent.items()}}
        },
    }


def _beside_eager(device: Any, trainer: Any) -> Callable[[], tuple[list, list]]:
    """Log an eager step, and when called a replayed one; gives (graphs' own, kept) addresses."""
    from pgolf.training.graphs import Graphs, Trial

    def step(name: str) -> None:
        device.note(kind="phase", name=name)
        trainer.step(0.0, trainer.config.optim.momentum)
        device.note(kind="phase", name="")

    def call() -> tuple[list, list]:
        graphs = trainer.step.__self__
        if not isinstance(graphs, Graphs):
            raise CountingError("graphs are off: why stands above")
        step("replayed")
        own = replay.pool_of(graphs.publishing) + replay.spans([*graphs.batch, graphs.numbers])
        state = [*Trial(trainer).state.values(), trainer.exchange.gradients]
        return own, replay.spans(state)

    step("eager")
    return call


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _turn(events: dict[str, list[dict]], number: int, memory: dict[int, tuple]) -> dict[str, Any]:
    parts = {w: events.get(f"{w} {number}", []) for w in ("forward", "backward", "rest")}
    every = [event for part in parts.values() for event in part]
    waits = Counter(e["name"] for e in every if e["kind"] == "wait")
    copies = Counter(e["kind"] for e in every)
    collectives = [e for e in every if e["kind"] == "collective"]
    before, after = memory[number], memory[number + 1]
    return {
        "graphs": sum(e["kind"] == "graph" for e in every),
        **{f"launches_{w}": sum(bool(kind_of(e)) for e in part) for w, part in parts.items()},
        "waits": {name: n for name, n in sorted(waits.items()) if name != PACING},
        "waits_for_an_earlier_step": waits[PACING],
        "allocations": after[0] - before[0],
        "pinned_allocations": after[1] - before[1],
        "copies_to_device": copies["memcpy_to_device"],
        "copies_to_host": copies["memcpy_to_host"],
        "bytes_to_device": sum(e["bytes"] for e in every if e["kind"] == "memcpy_to_device"),
        "collectives": dict(sorted(Counter(e["name"] for e in collectives).items())),
        "collective_bytes": sum(e["bytes"] for e in collectives),
        "control": sum(e["kind"] == "control" for e in every),
        "kernels_rest": dict(sorted(Counter(map(_kernel, filter(kind_of, parts["rest"]))).items())),
    }


def _kernel(event: dict[str, Any]) -> str:
    """What a launch is, with its kind."""
    import torch

    kind = kind_of(event)
    if kind == "gemm":
        return f"gemm {gemm_name(**event)}"
    if kind == "aten":
        # The kernel, and what it computes: the first of its template arguments that says so.
        names = re.findall(r"[A-Za-z]\w*", torch._C._demangle(event["name"]))
        return " ".join([kind, *[n for n in dict.fromkeys(names) if _TELLS.search(n)][:2]])
    return f"{kind} {kernel_name(event)}" if event["kind"] == "kernel" else event["kind"]


if __name__ == "__main__":
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as scratch:
        result = count_turn(request, Path(scratch) / "log.jsonl", Path(scratch))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
