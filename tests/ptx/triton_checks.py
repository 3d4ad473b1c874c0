"""What Triton's PTX for sm_90 has to compute: checks of the kernels, run by `python -m tests.ptx`.

Shapes and tiles are small and ragged. GEMMs have tiles of 64 rows, the least of wgmma, or 128 with
two groups of four warps.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import pgolf.ops  # noqa: F401  (fills the registry)
from pgolf.ops.operator import OPERATORS
from pgolf.triton_kernels import fake_quant, leaky_relu2_mlp, newton_schulz, xsa
from pgolf.triton_kernels.launch import configs

from .mutator import with_opcode
from .parser import Kernel
from .triton_launch import SETTINGS, through_ptx

BF16, FP32 = torch.bfloat16, torch.float32
COLUMNS = 530  # two blocks of the quantiser's backward
ONE = [(3.0, -4.0, 2.0)]  # an iteration of Newton-Schulz


def expect_close(name: str, k: int, got: Tensor, usual: Tensor, exact: Tensor) -> None:
    """err(got) <= k err(usual) + floor, against the exact result; `usual` is torch's."""
    assert got.shape == exact.shape and bool(torch.isfinite(got).all()), name
    floor = torch.finfo(got.dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    allowed = k * (usual.double() - exact).abs().max() + floor
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@contextlib.contextmanager
def tiles(prefix: str, warps: int, **blocks: int) -> Iterator[None]:
    """Other sizes for all configurations of some kernels."""
    before = {kernel: list(rows) for kernel, rows in configs().items()}
    for kernel, rows in configs().items():
        if kernel.startswith(prefix):
            for i, row in enumerate(rows):
                sizes = {**row.blocks, **{n: v for n, v in blocks.items() if n in row.blocks}}
                rows[i] = dataclasses.replace(row, blocks=sizes, num_warps=warps)
    try:
        yield
    finally:
        configs().update(before)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_xsa(dtype: torch.dtype, d: int) -> None:
    dz, y = (random(2, 4, 9, d, dtype=dtype, seed=s).transpose(1, 2) for s in (1, 2))
    v = random(2, 9, 8, d, dtype=dtype, seed=3)[:, :, 6:]

    def differentiated(*inputs: Tensor) -> tuple[Tensor, ...]:
        upstream, *leaves = (t.detach().requires_grad_() for t in inputs)
        z = OPERATORS["xsa"].reference(*leaves)
        return z.detach(), *torch.autograd.grad(z, leaves, upstream.detach())

    got = xsa.xsa(y, v), *xsa.xsa_backward(dz, y, v)
    usual, exact = differentiated(dz, y, v), differentiated(dz.double(), y.double(), v.double())
    for name, k, *results in zip(("z", "dy", "dv"), (2, 3, 3), got, usual, exact, strict=True):
        expect_close(name, k, *results)


def ties(columns: int, dtype: torch.dtype) -> Tensor:
    """A row a step: w / s is n + 1/2 for every n, exactly if the division is rounded correctly."""
    steps = torch.tensor([3.0, 0.75, 6 / 1024, 1 / 1024])[:, None]  # so few bits that bf16 has them
    halves = torch.arange(columns) % 62 - 30.5
    halves[0] = 31.0  # the largest code of six bits
    return (steps * halves).to(dtype)


def peaks(dtype: torch.dtype) -> Tensor:
    """A row for each of some columns, where its greatest weight stands alone: a maximum over a row
    that leaves one of them out is noticed. The last row is random."""
    alone = (0, 1, 6, 31, 97, 250, 300, 471, COLUMNS - 1)
    w = random(len(alone) + 1, COLUMNS, dtype=dtype, seed=4).clamp(-3.0, 3.0)
    w[range(len(alone)), alone] = 5.0
    return w


def check_fake_quant(dtype: torch.dtype, multiple: int = 1) -> None:
    w = torch.cat([ties(COLUMNS, dtype), peaks(dtype)])
    w[-1, 5] = float("nan")
    clip, on = torch.ones(len(w)), torch.tensor(1.0)
    for bits in (torch.tensor(6.0), torch.tensor(4.0)):
        arguments = (w, clip, bits, on, 0.0, multiple, False)
        value, scale = fake_quant.fake_quant(*arguments)
        wanted = OPERATORS["fake_quant"].reference(*arguments)
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)
        dout = random(*w.shape, dtype=dtype, seed=5)
        dw = fake_quant.fake_quant_backward(dout, w, scale, bits, on, multiple, False)
        leaf = w.clone().requires_grad_()
        clipped = OPERATORS["fake_quant"].reference(leaf, *arguments[1:], clip_mask=True)
        (gradient,) = torch.autograd.grad(clipped, leaf, dout)
        assert torch.equal(dw[:-1], gradient[:-1])


def with_division(kernel: Kernel, opcode: str) -> Kernel:
    """The kernel with another division of float32."""
    changed = [
        with_opcode(i, opcode) if i.opcode == "div.rn.f32" else i for i in kernel.instructions
    ]
    return dataclasses.replace(kernel, instructions=changed)


def check_division_of_the_quantiser() -> None:
    """The text says div.rn, and another division would be noticed."""
    with through_ptx() as kernels:
        check_fake_quant(FP32)
        check_fake_quant(BF16, multiple=4)
    for kernel in kernels:
        divisions = {i.opcode for i in kernel.instructions if i.parts[0] in ("div", "rcp")}
        assert divisions == {"div.rn.f32"}, f"{kernel.name}: {divisions}"
    for other in ("div.full.f32", "div.approx.f32"):
        with mock.patch.object(SETTINGS, "change", lambda k, o=other: with_division(k, o)):
            try:
                with through_ptx():
                    check_fake_quant(FP32)
            except AssertionError:
                continue
        raise AssertionError(f"{other} passes the check of the quantiser")


def check_newton_schulz(
    dtype: torch.dtype, *shape: int, row_norm: bool = False, known: bool = False
) -> None:
    """Also from sums of squares that are known."""
    g = random(*shape, dtype=FP32, seed=6)
    squares = g.square().sum(-1) if known else None
    got = newton_schulz.newton_schulz(g, ONE, dtype, row_norm=row_norm, squares=squares)
    usual, exact = (
        OPERATORS["newton_schulz"].reference(x, ONE, d, row_norm=row_norm)
        for x, d in ((g, dtype), (g.double(), torch.float64))
    )
    expect_close("x", 2, got, usual, exact)


def check_normalisation(dtype: torch.dtype) -> None:
    """The two kernels before the iterations, with rows that have to be normalised and without."""
    for row_norm in (False, True):
        g = random(2, 17, 40, dtype=dtype, seed=7)
        got = newton_schulz.newton_schulz(g, [], dtype, row_norm=row_norm, safety=1.05)
        usual, exact = (
            OPERATORS["newton_schulz"].reference(x, [], x.dtype, row_norm=row_norm, safety=1.05)
            for x in (g, g.double())
        )
        expect_close("x", 2, got, usual, exact)


def check_mlp(dtype: torch.dtype, t: int, d: int, f: int, with_rstd: bool) -> None:
    h, dout = (random(t, d, dtype=dtype, seed=s) for s in (8, 9))
    w_up, w_down = random(f, d, dtype=dtype, seed=10), random(d, f, dtype=dtype, seed=11)
    rstd = torch.rand(t, generator=torch.Generator().manual_seed(12)) if with_rstd else None
    post, bits = leaky_relu2_mlp.up(h, w_up, 0.5, rstd, tma=False)
    dpre = leaky_relu2_mlp.down_dgrad(dout, w_down, post, bits, 0.5, rstd, tma=False)
    positive = (bits[:, :, None] >> torch.arange(32) & 1).reshape(t, -1)[:, :f] != 0

    def forward(x: Tensor, w: Tensor) -> Tensor:
        pre = x @ w.T
        pre = pre if rstd is None else (rstd[:, None] * pre).to(x.dtype)
        return torch.where(pre > 0, pre, 0.5 * pre) ** 2

    def backward(x: Tensor, w: Tensor, saved: Tensor) -> Tensor:
        slopes = torch.where(positive, 2.0, -1.0).to(x.dtype) * saved.sqrt()
        grad = x @ w * slopes
        return grad if rstd is None else (rstd[:, None] * grad).to(x.dtype)

    exact_pre = h.double() @ w_up.double().T
    clear = exact_pre.abs() > 1e-3 * exact_pre.abs().max()
    assert torch.equal(positive[clear], (exact_pre > 0)[clear])
    expect_close("post", 2, post, forward(h, w_up), forward(h.double(), w_up.double()))
    exact = backward(dout.double(), w_down.double(), post.double())
    expect_close("dpre", 3, dpre, backward(dout, w_down, post), exact)


def _run(check: Callable[..., None], *args: object, **named: object) -> Callable[[], None]:
    def run() -> None:
        with through_ptx():
            check(*args, **named)

    return run


def _tiled(prefix: str, warps: int, check: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with tiles(prefix, warps, BLOCK_M=16 * warps, BLOCK_N=64, BLOCK_K=32):
            check()

    return run


def checks() -> dict[str, Callable[[], None]]:
    """By name, each beginning with a module of triton_kernels."""
    return CHECKS


CHECKS: dict[str, Callable[[], None]] = {
    "xsa fp32": _run(check_xsa, FP32, 32),
    "xsa bf16": _run(check_xsa, BF16, 80),
    "fake_quant fp32": _run(check_fake_quant, FP32),
    "fake_quant bf16": _run(check_fake_quant, BF16, multiple=4),
    "fake_quant's division": check_division_of_the_quantiser,
    "newton_schulz norms and scale fp32": _run(check_normalisation, FP32),
    "newton_schulz norms and scale bf16": _run(check_normalisation, BF16),
    "newton_schulz product fp32": _tiled(
        "newton_schulz_product", 4, _run(check_newton_schulz, FP32, 1, 24, 40)
    ),
    "newton_schulz product bf16": _tiled(
        "newton_schulz_product", 4, _run(check_newton_schulz, BF16, 1, 72, 96)
    ),
    "newton_schulz product bf16, sums of squares": _tiled(
        "newton_schulz_product", 4, _run(check_newton_schulz, BF16, 1, 40, 72, known=True)
    ),
    "newton_schulz product bf16, tall": _tiled(
        "newton_schulz_product", 4, _run(check_newton_schulz, BF16, 1, 136, 64, row_norm=True)
    ),
    "leaky_relu2_mlp fp32": _tiled("leaky_relu2", 4, _run(check_mlp, FP32, 33, 36, 40, True)),
    "leaky_relu2_mlp bf16": _tiled("leaky_relu2", 4, _run(check_mlp, BF16, 70, 168, 96, True)),
    "leaky_relu2_mlp bf16, two warpgroups": _tiled(
        "leaky_relu2", 8, _run(check_mlp, BF16, 70, 72, 64, False)
    ),
}
