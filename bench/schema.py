"""The lines that benchmarks write: one JSON object each, with the same fields for all operators."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from pgolf.files import atomic_write
from pgolf.training.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where, when and with what a benchmark ran."""

    device: str  # name
    threads: int
    torch: str
    triton: str | None
    pgolf: str
    commit: str | None
    date: str  # UTC, ISO 8601
    command: str
    malloc: str  # 'kept': freed memory stays with the process; 'default'


Line = TypeVar("Line", bound=Setting)


@dataclass(frozen=True, kw_only=True)
class Timing(Setting):
    """A line of `bench ops`: one provider of an operator on one sample, in one mode."""

    operator: str
    provider: str
    mode: str  # forward, backward, both
    sample: str
    shapes: list[list[int]]  # of the tensors among the arguments
    dtype: str
    cold: bool  # caches were flushed before each call
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    percent_of_floor: float  # 100 at the floor, 50 at twice its time
    bytes: int  # least traffic, as the operator's cost() says
    flops: int
    copy_gbs: float  # read + written, of a copy that moves copy_bytes
    copy_bytes: int
    matmul_gflops: float | None  # where the operator has matmuls
    matmul_shapes: list[list[list[int]]]  # of the factors of the matmuls that were timed
    host_ms: float | None  # least time that the host took to queue it; None on a CPU


@dataclass(frozen=True, kw_only=True)
class Paired(Setting):
    """A line of `bench ops --against`: one case in two checkouts, whose processes took turns."""

    operator: str
    provider: str
    mode: str
    sample: str
    dtype: str
    cold: bool
    rounds: int  # of a process, whose median is one number
    pairs: int  # of processes
    median_ms: float  # of the processes here
    other_median_ms: float
    ratio: float  # here / there: geometric mean of the pairs'
    ratio_low: float  # its 95 % interval
    ratio_high: float
    other_commit: str | None


@dataclass(frozen=True, kw_only=True)
class StepTiming(Setting):
    """A line of `bench step`: training steps of a recipe with one choice of operators."""

    recipe: str
    overrides: dict[str, str]
    ops: str  # as asked
    chosen: dict[str, str]  # operator -> implementation that ran
    compile: bool
    dtype: str
    tokens: int  # of a step
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    tokens_per_second: float
    loss: float | None  # of the first step, the same tokens for every choice; None: not finite
    first_ms: float  # median of the first choice in the same rounds
    phases: dict[str, dict[str, float | None]]  # as bench.phases gives them
    peak_bytes: int | None  # that a step takes beyond what stays; None on a CPU
    profile: dict[str, Any] | None  # as bench.profiling gives it, if it was asked for


@dataclass(frozen=True, kw_only=True)
class FormSize(Setting):
    """A line of `bench artifact`: one model in one codec and packing."""

    source: str
    form: str  # codec and packing
    weights: int
    file_bytes: int
    entropy_bytes: float  # order-0, of all codes, tensor by tensor
    encode_seconds: float
    decode_seconds: float  # of read_artifact, in a fresh process
    decoder_bytes: int  # by which that raised the peak of the process
    decoded_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorSize(Setting):
    """Another: the codes of one tensor, without steps and factors."""

    source: str
    tensor: str
    shape: list[int]
    bits: int
    entropy_bits: float  # order-0, a weight
    coded_bits: float  # what rans takes, a weight


@dataclass(frozen=True, kw_only=True)
class Quality(Setting):
    """A line of `bench quality`: a run's weights, quantised in one way."""

    run: str
    method: str
    bits: int  # nominal, of the block matrices
    bytes_model: int
    bpb_live: float  # of the weights before
    bpb: float  # of the decoded file
    expected_loss: float  # nats a token, by Hessians and moments
    stride: int


@dataclass(frozen=True, kw_only=True)
class DecodeTiming(Setting):
    """The line of `bench decode`: text of a recipe's model, with caches and with whole passes."""

    recipe: str
    overrides: dict[str, str]
    sequences: int  # in one batch, with caches
    tokens: int  # of a sequence
    dtype: str
    rounds: int
    cached_ms: float  # a step of all sequences
    cached_tokens_per_second: float
    whole_ms: float  # a token of one sequence, mean over contexts
    whole_tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Tried(Setting):
    """A line of `bench tune`: a configuration of a Triton kernel that was tried."""

    kernel: str
    row: int  # of the kernel in triton_kernels/configs.json
    blocks: dict[str, int | bool]
    num_warps: int
    num_stages: int
    ms: float | None  # of all launches with it; None: it fails, or is wrong


def setting(device: torch.device, command: str, malloc: str) -> Setting:
    """This machine, now."""
    known = provenance(device)
    names = ("device", "threads", "torch", "triton", "pgolf", "commit")
    return Setting(
        **{name: known[name] for name in names},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        malloc=malloc,
    )


def write_jsonl(path: Path, lines: Iterable[Setting]) -> None:
    """Replace `path` by these lines.

    Raises:
        StorageError: it cannot be written.
        ValueError: a figure is not finite.
    """
    texts = [json.dumps(dataclasses.asdict(line), allow_nan=False) for line in lines]
    atomic_write(path, "".join(text + "\n" for text in texts))


def read_jsonl(path: Path | None, kind: type[Line]) -> list[Line]:
    """The lines of a file as they were written; none if there is no file."""
    text = path.read_text(encoding="utf-8") if path and path.exists() else ""
    return [kind(**json.loads(line)) for line in text.splitlines()]
