"""For each file of csrc/cuda, the checks that its mutants have to get past.

They are those of tests/ops that iterate over the registry, on its small samples in both dtypes,
with guard zones around what is allocated.
"""

import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from pgolf.ops.registry import OPERATORS, Operator, Sample

from ..ops import test_operators as t
from ..ops import test_pack_bits
from ..ops.cases import Call, is_empty, takes
from ..ops.guards import guarded

# The operators that launch a file's kernels, where that is not the one of the file's name.
LAUNCHED_BY: dict[str, tuple[str, ...]] = {}


def checks_of(kernel: str) -> list[Callable[[], None]]:
    """Of a file such as 'xsa.cu'; empty where nothing is known to launch it."""
    stem = kernel.removesuffix(".cu")
    if stem == "pack_bits":
        return [pack_bits]
    names = [n for n in LAUNCHED_BY.get(stem, (stem,)) if n in OPERATORS]
    return [
        functools.partial(check, OPERATORS[name]) for name in names for check in (accuracy, edges)
    ]


def small_samples(operator: Operator) -> Iterator[tuple[Sample, torch.dtype]]:
    for sample in operator.samples():
        for dtype in (torch.float32, torch.bfloat16):
            if not sample.bench and takes(operator, "cuda", dtype):
                yield sample, dtype


def accuracy(operator: Operator) -> None:
    with known_references():
        for sample, dtype in small_samples(operator):
            if is_empty(sample):
                t.test_accuracy(operator, "cuda", sample, dtype)
                continue
            with guarded():
                t.test_accuracy(operator, "cuda", sample, dtype)


def edges(operator: Operator) -> None:
    for sample, dtype in small_samples(operator):
        if dtype is torch.float32 and not is_empty(sample):
            t.test_nan_is_not_hidden(operator, "cuda", sample)
            if len(operator.differentiable) > 1:
                t.test_any_subset_of_gradients(operator, "cuda", sample)


def known_references() -> mock._patch:
    """Results of references are computed by the first who asks, before there are any mutants."""
    run = Call.run

    def remembered(call: Call, impl: str) -> list[torch.Tensor]:
        if impl != "reference":
            return run(call, impl)
        key = (call.operator.name, repr(sorted(map(_described, call.arguments.items()))))
        if key not in _REFERENCES:
            _REFERENCES[key] = run(call, impl)
        return _REFERENCES[key]

    return mock.patch.object(Call, "run", remembered)


_REFERENCES: dict[tuple, list[torch.Tensor]] = {}


def _described(argument: tuple[str, object]) -> tuple[str, str]:
    name, value = argument
    if isinstance(value, torch.Tensor):
        return name, f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.double().sum()}"
    return name, str(value)


def pack_bits() -> None:
    from pgolf import extension

    module = extension.cuda()

    def pack(*arguments: int) -> None:
        module.pack_bits_cuda(*arguments, 0)

    def unpack(*arguments: int) -> None:
        module.unpack_bits_cuda(*arguments, 0)

    for count in test_pack_bits.COUNTS:
        for bits in (4, 5, 7, 8):
            test_pack_bits.check_kernels((pack, unpack), count, bits)
