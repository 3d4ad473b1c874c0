"""`python -m bench tune --epilogues`: where a GEMM with an epilogue is faster than two steps.

An operator that has one is a row of EPILOGUES. On this GPU, at the recipes' shapes, the operator is
checked, and the pass that has the epilogue timed against the product by cuBLAS and the row kernel,
by turns; what is faster goes into pgolf/ops/timed.json under the GPU's name, where `auto` finds it.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import torch

from bench import cases, timing
from pgolf.errors import PgolfError
from pgolf.files import atomic_write
from pgolf.ops import choose, timed
from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import Call, as_tuple, kernel

FASTER = 0.98  # it has to save 2 % of the pass, or noise decides
REPEATS = 20
SECONDS = 30.0  # for one epilogue
# What break-even rates suppose of two steps: FLOP/s of cuBLAS, bytes/s of memory, seconds a launch.
GEMM_RATE, MEMORY_RATE, LAUNCH = 600e12, 2.7e12, 2e-6

# Median milliseconds of each function, by turns.
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


@dataclass(frozen=True)
class Epilogue:
    """An operator one of whose passes has one.

    Attributes:
        operator: its name.
        which: pass, 'forward' or 'backward'.
        impl: with the epilogue.
        steps: arguments that make it two steps, by what `auto` takes for each of them.
        sample: label of a benchmark size of the operator, which is the recipes'.
        sizes: of that sample, as the operator's `obstacle` takes them.
        flops: of the product that has the epilogue.
        row_bytes: that the row kernel after the plain product reads and writes.
    """

    operator: str
    which: str
    impl: str
    steps: Mapping[str, str]
    sample: str
    sizes: timed.Sizes
    flops: float
    row_bytes: float

    @property
    def break_even(self) -> float:
        """FLOP/s below which it is slower than two steps, by the rates above."""
        steps = self.flops / GEMM_RATE + self.row_bytes / MEMORY_RATE + LAUNCH
        return self.flops / steps


TOKENS, WIDTH, HIDDEN = 98304, 512, 1536
UNIT = 2 * TOKENS * WIDTH  # bytes of a bf16 tensor of the tokens
EPILOGUES = [
    # dz, y, v -> dy, dv, of which v and dv have half of the heads
    Epilogue(
        "xsa_linear", "backward", "triton", {"impl": "reference", "xsa_impl": "auto"},
        "98304 tokens", {"size": 64, "share": 2, "heads": 8, "width": WIDTH},
        2 * TOKENS * WIDTH * WIDTH, 4 * UNIT,
    ),
    # x and the branch -> their sum
    Epilogue(
        "linear_residual", "forward", "triton", {"impl": "reference", "norm_impl": "auto"},
        "98304 tokens", {"width": WIDTH, "inner": WIDTH},
        2 * TOKENS * WIDTH * WIDTH, 3 * UNIT,
    ),
    # x, x0 and the branch -> their sum
    Epilogue(
        "linear_mix", "forward", "triton", {"impl": "reference", "norm_impl": "auto"},
        "98304 tokens", {"width": WIDTH, "inner": HIDDEN},
        2 * TOKENS * WIDTH * HIDDEN, 4 * UNIT,
    ),
    # q, k and v, twice as wide together as x, each read and written
    Epilogue(
        "linear_qk_rope", "forward", "triton", {"impl": "reference", "rope_impl": "auto"},
        "98304 tokens", {"size": 64, "heads": 8, "kv_heads": 4, "pairs": 8, "width": WIDTH},
        2 * TOKENS * WIDTH * 2 * WIDTH, 4 * UNIT,
    ),
    # what x gets from elsewhere and from the product, and x -> dx
    Epilogue(
        "norm_mlp", "backward", "triton",
        {"impl": "reference", "mlp_impl": "auto", "norm_impl": "auto"},
        "98304 tokens", {"width": WIDTH, "hidden": HIDDEN},
        2 * TOKENS * WIDTH * HIDDEN, 4 * UNIT,
    ),
]  # fmt: skip


def run(names: Sequence[str], device: torch.device, dry_run: bool) -> int:
    """Time the epilogues of these operators (() for all) on a GPU, and write what is faster.

    Raises:
        PgolfError: an operator has none, or the GPU is too busy.
        StorageError: the table cannot be written.
    """
    known = [e.operator for e in EPILOGUES]
    if unknown := sorted(set(names) - set(known)):
        raise PgolfError(f"no epilogue of {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = [e for e in EPILOGUES if not names or e.operator in names]
    name = torch.cuda.get_device_name(device)
    verdicts = {e.operator: decide(e, device, name, gpu_timer(device)) for e in wanted}
    if not dry_run:
        write(name, verdicts)
    return 0


def decide(epilogue: Epilogue, device: torch.device, name: str, timer: Timer) -> timed.Row:
    """Check and time one epilogue, and say how it went; a wrong one is never taken."""
    operator = OPERATORS[epilogue.operator]
    sample = next(s for s in operator.samples() if s.label == epilogue.sample)
    with cases.DrawnOn(device):
        call = Call.of(operator, sample, torch.bfloat16, device, contiguous=True)
    with_epilogue = kernel(operator, epilogue.impl)
    if problem := _problem(call, with_epilogue):
        reason = f"{epilogue.impl} is wrong on {name}: {problem}"
        verdict = timed.Row("reference", reason, epilogue.sizes)
        print(f"{epilogue.operator}: {verdict.reason}", flush=True)
        return verdict
    passes = forward if epilogue.which == "forward" else backward
    function = inspect.unwrap(operator.call)  # without what samples have multiplied out
    ways = {"epilogue": {"impl": epilogue.impl}, "steps": epilogue.steps}
    times = timer(
        {n: passes(call, functools.partial(function, **way)) for n, way in ways.items()}
    )
    fused, steps = times["epilogue"], times["steps"]
    print(
        f"{epilogue.operator}: {epilogue.which} {fused:.4g} ms with the epilogue, {steps:.4g} ms "
        f"in two steps, {fused / steps:.3f} of it; by rates of {GEMM_RATE / 1e12:.0f} TFLOP/s and "
        f"{MEMORY_RATE / 1e12:.1f} TB/s it breaks even at {epilogue.break_even / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    faster = fused <= FASTER * steps
    return timed.Row(
        epilogue.impl if faster else "reference",
        f"{epilogue.which} {fused:.4g} ms with the epilogue, {steps:.4g} in two steps "
        f"({name}, {date.today()})",
        epilogue.sizes,
    )


def _problem(call: Call, function: Callable) -> str:
    """Why a kernel is not to be taken; '' if it computes what it should."""
    try:
        return call.problem(function)
    except Exception as e:  # too large for the device, or not what the kernel is written for
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def forward(call: Call, function: Callable) -> Callable[[], object]:
    """The forward pass of a call, with what its gradient needs, again and again."""
    leaves = call.leaves()
    return lambda: call.on(function, *leaves)


def backward(call: Call, function: Callable) -> Callable[[], object]:
    """The backward pass of a call, again and again."""
    leaves = call.leaves()
    out = as_tuple(call.on(function, *leaves))
    upstream = call.upstream(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def gpu_timer(device: torch.device) -> Timer:
    """Medians of some runs by turns, each with cold caches."""
    clock, flush = timing.clock_of(device), timing.flusher(device)

    def milliseconds(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        entries = {n: timing.Entry(lambda _, f=f: f()) for n, f in functions.items()}
        times = timing.interleave(entries, REPEATS, clock, before=flush, seconds=SECONDS)
        if not times:
            raise PgolfError(f"three rounds take more than {SECONDS:.0f} s: is the GPU free?")
        return {n: timing.summarise(each).median for n, each in times.items()}

    return milliseconds


def write(name: str, verdicts: Mapping[str, timed.Row]) -> None:
    """Put the verdicts for a GPU into the table; others of it and of other GPUs stay.

    Raises:
        StorageError: the table cannot be written.
    """
    table = timed.table()
    table.setdefault(name, {}).update(verdicts)
    rows = {gpu: {n: row._asdict() for n, row in of.items()} for gpu, of in table.items()}
    atomic_write(timed.TIMED, json.dumps(rows, indent=1, sort_keys=True) + "\n")
    choose.choose.cache_clear()
    for operator, verdict in verdicts.items():
        print(f"{timed.TIMED.name}: {operator}={verdict.impl} on {name}: {verdict.reason}")
