"""For each file of csrc/cuda, the checks that its mutants have to get past.

They are those of tests/ops that iterate over the registry, on its small samples in both dtypes,
with guard zones around what is allocated.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from pgolf.ops import grad_norm, param_update, xsa
from pgolf.ops.launch import run_cuda
from pgolf.ops.multi_tensor import adamw_row
from pgolf.ops.operator import OPERATORS, Operator, Sample
from pgolf.ops.testing import Call, Function
from pgolf.ops.token_sums import token_sums

from ...ops import test_embed_smear as smear
from ...ops import (
    test_joined_norm,
    test_multi_tensor,
    test_qk_rope,
    test_qk_rope_results,
    test_scaled_copies,
    test_token_order,
    test_token_sums,
    test_weight_cast,
)
from ...ops import test_operators as t
from ...ops import test_residual_norm as norm
from ...ops import test_softcap_cross_entropy as loss
from ...ops.cases import is_empty, small, takes
from ...ops.guards import GuardZones

# The operators that launch a file's kernels, where that is not the one of the file's name.
LAUNCHED_BY: dict[str, tuple[str, ...]] = {
    "leaky_relu2": ("leaky_relu2_mlp",),
    "token_sums": ("qk_rope",),
}


def checks_of(kernel: str) -> list[Callable[[], None]]:
    """Of a file such as 'xsa.cu'; empty where nothing is known to launch it."""
    stem = kernel.removesuffix(".cu")
    names = [n for n in LAUNCHED_BY.get(stem, (stem,)) if n in OPERATORS]
    general = [
        functools.partial(check, OPERATORS[name]) for name in names for check in (accuracy, edges)
    ]
    return [*general, *BESIDES.get(stem, ())]


def small_samples(operator: Operator) -> Iterator[tuple[Sample, torch.dtype]]:
    for sample in small(operator):
        for dtype in (torch.float32, torch.bfloat16):
            if takes(operator, "cuda", dtype):
                yield sample, dtype


def accuracy(operator: Operator) -> None:
    with known_references():
        for sample, dtype in small_samples(operator):
            # What works in place alone allocates nothing, and neither does what is empty.
            allocates = operator.name != "param_update"
            allocates &= not is_empty(Call.of(operator, sample, dtype))
            with GuardZones(scratch=True) if allocates else contextlib.nullcontext():
                t.test_accuracy(operator, "cuda", sample, dtype)


def edges(operator: Operator) -> None:
    for sample, dtype in small_samples(operator):
        if dtype is torch.float32 and not is_empty(Call.of(operator, sample, dtype)):
            t.test_contract(operator, "cuda", sample)
            if len(operator.differentiable) > 1:
                t.test_any_subset_of_gradients(operator, "cuda", sample)


def known_references() -> mock._patch:
    """Results of references are computed by the first who asks, before there are any mutants."""
    run = Call.run

    def remembered(call: Call, function: Function) -> list[torch.Tensor]:
        if function is not call.reference:
            return run(call, function)
        seen = sorted(map(_described, call.arguments.items()))
        key = (call.reference.__module__, repr(seen), repr(call.upstream([torch.ones(2)])))
        if key not in _REFERENCES:
            _REFERENCES[key] = run(call, function)
        return _REFERENCES[key]

    return mock.patch.object(Call, "run", remembered)


_REFERENCES: dict[tuple, list[torch.Tensor]] = {}


def _described(argument: tuple[str, object]) -> tuple[str, str]:
    name, value = argument
    if isinstance(value, torch.Tensor):
        return name, f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.double().sum()}"
    return name, str(value)


def xsa_of_tiny_values() -> None:
    """Norms of v on both sides of the floor of 1e-12."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(1, 4, 4, 64, generator=g)
    v = torch.nn.functional.normalize(torch.randn(1, 4, 2, 64, generator=g), dim=-1)
    v *= torch.tensor([0.5e-12, 0.9e-12, 1.1e-12, 1.5e-12]).view(1, 4, 1, 1)
    for a, b in zip(*(_with_gradients(y, v, impl) for impl in ("cuda", "reference")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def gradients_that_are_not_finite() -> None:
    grads = [torch.ones(3, 70), torch.ones(9001)[1:], torch.ones(5).bfloat16()]
    grads[0][1, 3] = grads[1][8999] = grads[2][4] = float("nan")
    grads[1][4] = -float("inf")
    assert grad_norm(grads, "cuda")[1] == 4
    many = [torch.full((2,), float("inf"))] * 40  # more chunks than a warp has lanes
    assert grad_norm(many, "cuda")[1] == 80


def averages_follow_what_is_stored() -> None:
    """At rate 1 the average is the parameter to the bit; without one the rate means nothing."""
    params, grads = torch.linspace(-1, 1, 50).bfloat16(), torch.linspace(3, -2, 50).bfloat16()
    moments, norm = [torch.zeros(50), torch.ones(50)], torch.tensor(1.0)
    rows = torch.tensor([adamw_row(1, 0.1, (0.9, 0.95), 1e-8, average_rate=1.0)])
    average = torch.zeros(50)
    state = [params], [grads], *([m] for m in moments)
    param_update(*state, norm, rows, [0], [average], impl="cuda")
    assert torch.equal(average, params.float())
    param_update(*state, norm, rows, [0], impl="cuda")


def _with_gradients(y: torch.Tensor, v: torch.Tensor, impl: str) -> list[torch.Tensor]:
    leaves = [y.clone().requires_grad_(), v.clone().requires_grad_()]
    out = xsa(*leaves, impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def tokens_by_id_in_any_order_of_threads() -> None:
    """Of so many ids that a block has several."""
    named = smear.tensors(smear.some_ids(2, 150, rows=300), 300, 8)
    for seed in range(3):
        with mock.patch.dict(os.environ, PGOLF_EMULATOR_SEED=str(seed)):
            smear.agree("cuda", named)


def sums_in_any_order_of_threads() -> None:
    """Of more sums than there are blocks."""
    ids, x = test_token_sums.drawn(2, 150, 200), torch.randn(2, 150, 40)
    with mock.patch.dict(os.environ, PGOLF_EMULATOR_SEED="0"):
        first = token_sums(run_cuda, ids, 5000, x)
    with mock.patch.dict(os.environ, PGOLF_EMULATOR_SEED="1"):
        assert torch.equal(token_sums(run_cuda, ids, 5000, x), first)
    exact = test_token_sums.expected(ids, 5000, x, None)
    assert torch.allclose(first.double(), exact, atol=1e-5)


UNALIGNED = functools.partial(test_multi_tensor.test_addresses_that_are_not_aligned, "cuda")


def norm_that_is_not_finite(name: str) -> Callable[[], None]:
    test = test_multi_tensor.test_a_norm_that_is_not_finite_changes_nothing
    return functools.partial(test, name, "cuda", torch.float32)


# What an operator needs beside its samples.
BESIDES: dict[str, list[Callable[[], None]]] = {
    "embed_smear": [
        functools.partial(smear.test_shapes, "cuda", 8, 2, 620),  # many partial sums
        tokens_by_id_in_any_order_of_threads,
        *(
            functools.partial(test_token_order.test_lists_of_any_number_and_size, count)
            for count in (2, 9)
        ),
    ],
    "grad_norm": [gradients_that_are_not_finite, UNALIGNED],
    "muon_momentum": [UNALIGNED, norm_that_is_not_finite("muon_momentum")],
    "param_update": [
        UNALIGNED, averages_follow_what_is_stored, norm_that_is_not_finite("param_update"),
    ],
    "qk_rope": [
        functools.partial(test_qk_rope.test_without_norm_a_nan_stays_in_its_pair, "cuda", size)
        for size in (16, 17)
    ] + [
        functools.partial(test_qk_rope_results.test_against_float64, "cuda", dtype, shape)
        for dtype in (torch.bfloat16, torch.float32) for shape in test_qk_rope_results.SHAPES
    ] + [
        functools.partial(test_qk_rope_results.test_gradients_that_are_missing, "cuda", missing)
        for missing in ((0,), (1,), (2, 3))
    ] + [
        functools.partial(check, "cuda") for check in (
            test_qk_rope_results.test_gains_of_nearly_nothing,
            test_qk_rope_results.test_parts_that_are_summed_later,
        )
    ],
    "residual_norm": [
        # More parts of a sum over rows than are added up at a time.
        functools.partial(norm.test_shapes, "cuda", (2200, 8)),
        *(
            functools.partial(
                test_joined_norm.test_sums_of_products, terms, (3, 512), torch.bfloat16, "cuda"
            )
            for terms in (1, 3, 4)
        ),
    ],
    "scaled_copies": [
        functools.partial(test_scaled_copies.test_copies_that_nobody_used, "cuda"),
        functools.partial(test_scaled_copies.test_any_address, "cuda", torch.bfloat16),
    ],
    "softcap_cross_entropy": [
        functools.partial(check, columns, "cuda")
        for check in (loss.test_logits_that_lie_far_apart, loss.test_rows_of_very_negative_logits)
        for columns in (9, 1027)
    ],
    "token_sums": [
        *(
            functools.partial(test_token_sums.test_sums_of_tokens, "cuda", dtype, ids, rows, width)
            for dtype in (torch.float32, torch.bfloat16)
            for ids, rows in test_token_sums.IDS
            for width in (33, 296)
        ),
        functools.partial(test_token_sums.test_nothing_is_written_beside_the_sums, "cuda", 7),
        sums_in_any_order_of_threads,
    ],
    "weight_cast": [
        functools.partial(
            test_weight_cast.test_matrices_of_every_kind_in_one_call,
            "cuda", True, torch.float32, torch.bfloat16,
        ),
        functools.partial(
            test_weight_cast.test_any_address_and_row_stride, "cuda", torch.float32
        ),
        functools.partial(test_weight_cast.test_more_matrices_than_a_launch_takes, "cuda"),
    ],
    "xsa": [xsa_of_tiny_values],
}
