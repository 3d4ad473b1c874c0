"""Capped logits and cross-entropy against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf.ops.launch import launcher
from pgolf.ops.operator import OPERATORS
from pgolf.ops.softcap_cross_entropy import softcap_cross_entropy, softcap_logits

from .cases import implementations

N, D, V = 6, 8, 11


def inputs(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g) * scale
    return x, torch.randn(V, D, generator=g), torch.randint(V, (N,), generator=g)


def by_hand(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    z = x.double() @ w.double().T
    if cap:
        z = cap * torch.tanh(z / cap)
    weights = z.exp() / z.exp().sum(-1, keepdim=True)
    return -torch.stack([weights[i, t].log() for i, t in enumerate(targets.tolist())])


@pytest.mark.parametrize("cap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_loss_and_gradients(cap: float, scale: float) -> None:
    x, w, targets = inputs(scale)
    exact = [t.double().requires_grad_() for t in (x, w)]
    expected = by_hand(*exact, targets, cap)
    losses = softcap_cross_entropy(x, w, targets, cap, reduction="none")
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    leaves = [t.requires_grad_() for t in (x, w)]
    mean = softcap_cross_entropy(*leaves, targets, cap)
    assert mean.item() == pytest.approx(expected.mean().item(), rel=2e-6)
    for got, want in zip(
        torch.autograd.grad(mean, leaves), torch.autograd.grad(expected.mean(), exact), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_logits_stay_below_the_cap(cap: float) -> None:
    x, w, _ = inputs(1000.0)
    logits = softcap_logits(x, w, cap)
    assert logits.abs().max() <= cap and logits.dtype is torch.float32
    assert softcap_logits(x, w, 0.0).abs().max() > 1000


def test_cap_and_softmax_of_bf16_inputs_are_fp32() -> None:
    x, w, targets = inputs(4.0)
    x, w = x.bfloat16(), w.bfloat16()
    loss = softcap_cross_entropy(x, w, targets, 30.0, reduction="none")
    assert loss.dtype is torch.float32
    z = (x @ w.T).double()  # the matmul's own bf16 rounding
    capped = 30 * torch.tanh(z / 30)
    expected = torch.logsumexp(capped, -1) - capped.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_huge_logits_give_finite_losses() -> None:
    x, w, targets = inputs(1e4)
    assert softcap_cross_entropy(x, w, targets, 30.0, reduction="none").isfinite().all()
    assert softcap_cross_entropy(x, w, targets, 0.0, reduction="none").isfinite().all()


def test_uniform_logits_give_log_v() -> None:
    _, w, targets = inputs()
    losses = softcap_cross_entropy(torch.zeros(N, D), w, targets, 30.0, reduction="none")
    torch.testing.assert_close(losses, torch.full((N,), float(V)).log())


def test_strided_inputs() -> None:
    x, w, targets = inputs()
    wide = torch.cat((x, x), 1)[:, :D]
    torch.testing.assert_close(
        softcap_cross_entropy(wide, w.T.contiguous().T, targets, 30.0),
        softcap_cross_entropy(x, w, targets, 30.0),
    )


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_float64_stays_float64(cap: float) -> None:
    x, w, targets = inputs()
    leaves = [t.double().requires_grad_() for t in (x, w)]
    losses = softcap_cross_entropy(*leaves, targets, cap, reduction="none")
    torch.testing.assert_close(losses, by_hand(*leaves, targets, cap), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: softcap_cross_entropy(x, w, targets, cap), leaves)


# --- the kernels ----------------------------------------------------------------------------------

KERNELS = implementations(OPERATORS["softcap_cross_entropy"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def row_kernel(
    impl: str, z: torch.Tensor, targets: torch.Tensor, cap: float, offset: int = 65
) -> tuple:
    """(losses, dz) of z (N, V), which lies amid a pattern, by default off every alignment."""
    memory = torch.full((z.numel() + 130,), 7.0, dtype=z.dtype)
    inside = memory[offset : offset + z.numel()].view(z.shape)
    inside.copy_(z)
    losses = launcher("softcap_cross_entropy", impl, "rows")(inside, targets, cap, 1.0, True)
    assert (memory[:offset] == 7).all() and (memory[offset + z.numel() :] == 7).all()
    return losses, inside


def check_rows(
    impl: str, z: torch.Tensor, targets: torch.Tensor, cap: float, offset: int = 65
) -> None:
    """Losses and dz against those of float64, dz to a rounding of its dtype."""
    exact = z.double().requires_grad_()
    logits = cap * torch.tanh(exact / cap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses, dz = row_kernel(impl, z, targets, cap, offset)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rounding = 2.0**-8 if z.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(dz.double(), gradient, rtol=rounding, atol=1e-6)


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@every_kernel
@every_dtype
@pytest.mark.parametrize("columns", [1, 9, 1024, 1027, 2050])
def test_rows_of_any_length_and_alignment(columns: int, dtype: torch.dtype, impl: str) -> None:
    z = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)) * 20
    check_rows(impl, z.to(dtype), torch.arange(5) * columns // 5, 30.0)


@every_kernel
@every_dtype
@pytest.mark.parametrize("columns", [1024, 2056])
def test_targets_anywhere_in_aligned_rows(columns: int, dtype: torch.dtype, impl: str) -> None:
    """Whichever thread and access hold them."""
    targets = torch.tensor([0, 3, 4, 7, 8, 127, 128, 255, 256, 1023, columns - 8, columns - 1])
    z = torch.randn(len(targets), columns, generator=torch.Generator().manual_seed(2)) * 20
    check_rows(impl, z.to(dtype), targets, 30.0, offset=64)


@every_kernel
@every_dtype
@pytest.mark.parametrize("cap", [0.5, 1.0, 32.0, 32.5, 100.0])
def test_caps_of_any_size(cap: float, dtype: torch.dtype, impl: str) -> None:
    """Logits near 0, far beyond the cap on both sides, and a target at either end of them."""
    z = torch.linspace(-4 * cap, 4 * cap, 41).repeat(3, 1)
    check_rows(impl, z.to(dtype), torch.tensor([0, 20, 40]), cap)


@every_kernel
@every_dtype
def test_logits_beyond_every_number_are_at_the_cap(dtype: torch.dtype, impl: str) -> None:
    z = torch.zeros(2, 9, dtype=dtype)
    z[0, 3], z[1, 3] = float("inf"), -float("inf")
    z[:, 5] = torch.finfo(dtype).max
    check_rows(impl, z, torch.tensor([0, 3]), 30.0)


@every_kernel
@every_dtype
@pytest.mark.parametrize("columns", [9, 1027])
def test_rows_that_are_not_finite_stay_alone(columns: int, dtype: torch.dtype, impl: str) -> None:
    z = torch.zeros(4, columns, dtype=dtype)
    z[1:3, columns // 2] = float("nan")
    losses, dz = row_kernel(impl, z, torch.tensor([0, 0, columns // 2, 0]), 30.0)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert dz[1:3].isnan().all() and dz[::3].isfinite().all()


@every_kernel
@every_dtype
def test_an_ignored_row_that_is_not_finite_has_no_loss(dtype: torch.dtype, impl: str) -> None:
    z = torch.full((1, 9), float("nan"), dtype=dtype)
    losses, dz = row_kernel(impl, z, torch.tensor([-100]), 30.0)
    assert losses.tolist() == [0] and dz.isnan().all()


@every_kernel
@pytest.mark.parametrize("columns", [9, 1027])
def test_rows_of_very_negative_logits(columns: int, impl: str) -> None:
    """What lies behind the row's end is not its maximum: all powers would be 0."""
    z = torch.full((2, columns), -200.0)
    losses, _ = row_kernel(impl, z, torch.tensor([0, columns - 1]), 0.0)
    torch.testing.assert_close(losses, torch.full((2,), float(columns)).log())


@every_kernel
@pytest.mark.parametrize("columns", [9, 1027])
def test_logits_that_lie_far_apart(columns: int, impl: str) -> None:
    """Powers are those of differences to the greatest, wherever it stands: none is too large."""
    z = torch.linspace(-300, 300, columns).repeat(2, 1)
    z[1] = z[1].flip(0)
    targets = torch.tensor([0, 3])
    expected = torch.nn.functional.cross_entropy(z.double(), targets, reduction="none")
    losses, _ = row_kernel(impl, z, targets, 0.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@every_kernel
@every_dtype
def test_targets_outside_of_the_row(dtype: torch.dtype, impl: str) -> None:
    z, targets = torch.zeros(3, 9, dtype=dtype), torch.tensor([0, 9, -1])
    if impl == "cpu":
        with pytest.raises(ValueError, match=r"targets\[1\]"):
            row_kernel(impl, z, targets, 30.0)
        return
    losses, dz = row_kernel(impl, z, targets, 30.0)
    assert losses.isnan().tolist() == [False, True, True]
    assert dz[0].isfinite().all() and dz[1:].isnan().all()


@every_kernel
def test_one_gradient_alone_twice_and_none(impl: str) -> None:
    x, w, targets = inputs()
    for i in range(2):
        leaf = (x, w)[i].clone().requires_grad_()
        args = (leaf, w) if i == 0 else (x, leaf)
        mine = softcap_cross_entropy(*args, targets, 30.0, "none", impl)
        upstream = torch.arange(2.0 * N)[::2]
        theirs = softcap_cross_entropy(*args, targets, 30.0, "none", "reference")
        (expected,) = torch.autograd.grad(theirs, leaf, upstream)
        for _ in range(2):
            (got,) = torch.autograd.grad(mine, leaf, upstream, retain_graph=True)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(softcap_cross_entropy(*args, targets, 30.0, "none", impl), mine)


class Products(TorchDispatchMode):
    """Keeps the shapes of what is multiplied element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
            self.shapes += [t.shape for t in args if isinstance(t, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@every_kernel
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_factor_of_all_rows_goes_to_the_matrix(reduction: str, impl: str) -> None:
    """No pass over what each token has is made for it, and the gradients are those of the rows."""
    x, w, targets = inputs()
    leaves = [t.requires_grad_() for t in (x, w)]
    loss = softcap_cross_entropy(*leaves, targets, 30.0, reduction, impl)
    with Products() as products:
        found = torch.autograd.grad(loss, leaves, torch.tensor(0.3))
    assert products.shapes and all(N not in shape for shape in products.shapes)
    rows = softcap_cross_entropy(*leaves, targets, 30.0, "none", impl)
    each = torch.full((N,), 0.3 / (N if reduction == "mean" else 1))
    for got, expected in zip(found, torch.autograd.grad(rows, leaves, each), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# --- targets that are ignored ---------------------------------------------------------------------

F32, F64 = torch.float32, torch.float64
every_implementation = pytest.mark.parametrize("impl", ["reference", *KERNELS])


@every_implementation
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", [[], [0], [1, 3, 4], range(5)])
def test_ignored_targets_are_those_of_cross_entropy(
    reduction: str, which: list[int], impl: str
) -> None:
    x, w, targets = (t[:5] if i != 1 else t for i, t in enumerate(inputs()))
    targets = targets.clone()
    targets[list(which)] = -100
    leaves, exact = ([t.to(d, copy=True).requires_grad_() for t in (x, w)] for d in (F32, F64))
    got = softcap_cross_entropy(*leaves, targets, 30.0, reduction, impl)
    z = exact[0] @ exact[1].T
    want = torch.nn.functional.cross_entropy(30 * torch.tanh(z / 30), targets, reduction=reduction)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    upstream = torch.linspace(1, 2, got.numel()).view(got.shape)
    mine = torch.autograd.grad(got, leaves, upstream)
    theirs = torch.autograd.grad(want, exact, upstream.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@every_kernel
def test_a_mean_without_some_rows_is_as_exact_in_bf16(impl: str) -> None:
    """The share of rows that count, here 7 / 3, is no factor that bf16 could round."""
    x = torch.ones(7, 16, dtype=torch.bfloat16)
    w = torch.zeros(4, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.tensor([0, 1, 2, -100, -100, -100, -100])
    (got,) = torch.autograd.grad(softcap_cross_entropy(x, w, targets, 0.0, impl=impl), w)
    expected = torch.tensor([-1 / 12] * 3 + [0.25], dtype=torch.float64)
    torch.testing.assert_close(got[:, 0].double(), expected, rtol=2.0**-8, atol=0)


def test_a_target_out_of_range_says_what_is_ignored() -> None:
    x, w, targets = inputs()
    targets[1] = -1
    with pytest.raises(ValueError, match=r"targets\[1\] is -1: .* columns, and -100 is ignored"):
        softcap_cross_entropy(x, w, targets, 30.0, impl="cpu")
    with pytest.raises(ValueError, match="reduction='max': it has to be one of"):
        softcap_cross_entropy(x, w, targets, 30.0, reduction="max")
