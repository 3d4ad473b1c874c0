"""The gradient of qk_rope from q, k and rstd in place of what they were made of."""

import pytest
import torch
from torch import Tensor

from pgolf.ops.launch import run_cpp, run_cuda
from pgolf.ops.linear_qk_rope import LEAST_GAIN, plain_gradient
from pgolf.ops.operator import OPERATORS
from pgolf.ops.part_sums import sum_parts
from pgolf.ops.qk_rope import reference, rope_table
from pgolf.ops.qk_rope_kernels import backward_of_results

from .cases import implementations
from .guards import GuardZones

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
KERNELS = implementations(OPERATORS["qk_rope"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)
every_form = pytest.mark.parametrize("impl", ["reference", *KERNELS])
EPS, ROWS = 1e-2, 5
NAMES = "q", "k", "rstd", "cos", "sin", "gain", "factor", "ids"
# T, H, G, d, rotated elements: one token and more than a block's, sizes that no vector divides.
SHAPES = [
    (1, 8, 4, 64, 16), (33, 8, 4, 64, 64), (3, 4, 2, 64, 64), (2, 3, 1, 33, 6), (70, 2, 1, 8, 0),
    (2, 9, 2, 256, 250),
]  # fmt: skip


def case(time: int, heads: int, groups: int, size: int, dims: int) -> tuple[dict, list, tuple]:
    """Arguments by name, upstream gradients (v twice), and what they lead to, in float64."""
    g = torch.Generator().manual_seed(time + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=FP64)

    qkv = normal(2, time, (heads + 2 * groups) * size)
    angle = torch.acos(rope_table(time, dims, 100.0)[0].double())
    cos, sin = angle.cos(), angle.sin()  # to the last bit of float64
    gain, factor = torch.linspace(0.5, -1.4, heads).double(), normal(2, time).abs() + 0.1
    ids = torch.randint(ROWS, (2, time), generator=g)
    leaves = [qkv.requires_grad_(), gain.requires_grad_(),
              normal(ROWS, groups * size).requires_grad_()]  # fmt: skip
    q, k, *values = reference(
        qkv, cos, sin, gain, heads, groups, EPS, True, leaves[2], factor, True, ids
    )
    upstream = [normal(*t.shape) for t in (q, k, *values)]
    truth = torch.autograd.grad([q, k, *values], leaves, upstream)
    squares = qkv.detach().view(2, time, -1, size)[:, :, : heads + groups].square().mean(-1)
    f = factor[..., None]
    rstd = f / (squares * f.square() + EPS).sqrt()
    given = (q.detach(), k.detach(), rstd, cos, sin, gain.detach(), factor, ids)
    return dict(zip(NAMES, given, strict=True)), upstream, truth


def cast(given: dict, upstream: list, dtype: torch.dtype) -> tuple[dict, list]:
    """In a dtype, and what belongs beside it; gradients as attention leaves them."""
    wide = torch.promote_types(dtype, FP32)
    own = {n: t if n == "ids" else t.to(dtype if n in "qk" else wide) for n, t in given.items()}
    apart = [t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in upstream]
    return own, apart


def run(impl: str, given: dict, upstream: list, rows: int = ROWS) -> tuple[Tensor, ...]:
    """dqkv, d_gain and the gradient of the table."""
    tensors = [given[name] if rows or name != "ids" else None for name in NAMES]
    if impl == "reference":
        return plain_gradient(*upstream, *tensors, rows)
    return backward_of_results(*upstream, *tensors, None, None, rows, False, impl)


def close(mine: tuple, truth: tuple, dtype: torch.dtype) -> None:
    tolerance = {BF16: 0.03, FP32: 2e-5, FP64: 1e-11}[dtype]
    for a, b in zip(mine, truth, strict=True):
        scale = b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("reference", dtype) for dtype in (BF16, FP32, FP64)]
    + [(n, dtype) for n in KERNELS for dtype in OPERATORS["qk_rope"].implementations[n].dtypes],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(impl: str, dtype: torch.dtype, shape: tuple) -> None:
    given, upstream, truth = case(*shape)
    close(run(impl, *cast(given, upstream, dtype)), truth, dtype)


@every_form
@pytest.mark.parametrize("missing", [(0,), (1,), (2, 3), (3,), (0, 1), (1, 2, 3)])
def test_gradients_that_are_missing(impl: str, missing: tuple) -> None:
    """They count as zeros."""
    given, upstream = cast(*case(3, 4, 2, 16, 8)[:2], FP32)
    zeros = [torch.zeros_like(t) if i in missing else t for i, t in enumerate(upstream)]
    absent = [None if i in missing else t for i, t in enumerate(upstream)]
    found, wanted = run(impl, given, absent), run("reference", given, zeros)
    close(found, tuple(t.double() for t in wanted), FP32)


@every_form
def test_gains_of_nearly_nothing(impl: str) -> None:
    """q has 2^-100 n for them: d_gain comes of that n, and next to nothing goes on."""
    given, upstream, _ = case(3, 4, 2, 16, 8)
    n = given["q"] / given["gain"][:, None]
    gain = torch.tensor([0.0, -1e-35, 2.0**-101, LEAST_GAIN], dtype=FP64)
    given["q"] = n * torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None].double() * LEAST_GAIN
    given["gain"] = gain
    own, apart = cast(given, upstream, FP32)
    dqkv, d_gain, _ = run(impl, own, apart)
    # (q and dq turn alike: their product does not.)
    wanted = (n * upstream[0]).sum((0, 1, 3))
    torch.testing.assert_close(d_gain.double(), wanted, rtol=1e-4, atol=1e-4)
    heads = dqkv.view(2, 3, 8, 16)[:, :, :4].abs().amax((0, 1, 3))
    assert heads[0] == 0 and 0 < heads[1] < 1e-33 and (heads[2:] < 1e-28).all()


@every_kernel
@pytest.mark.parametrize("name", ["q", "k", "dq", "dk"])
def test_a_nan_stays_in_its_head(impl: str, name: str) -> None:
    given, upstream = cast(*case(4, 4, 2, 16, 8)[:2], FP32)
    at = {"dq": upstream[0], "dk": upstream[1]}.get(name, given.get(name))
    at[1, 2, 1, 15] = float("nan")
    head = 1 if name in ("q", "dq") else 5
    dqkv, d_gain, _ = run(impl, given, upstream)
    assert dqkv.isnan().sum() == dqkv[1, 2, 16 * head : 16 * head + 16].isnan().sum() == 16
    assert d_gain.isnan().tolist() == [False, head == 1, False, False]


@every_kernel
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_any_address(impl: str, dtype: torch.dtype) -> None:
    """Memory that starts off a 16-byte boundary gives the numbers of memory that does not."""
    given, upstream = cast(*case(3, 8, 4, 64, 16)[:2], dtype)
    off = {n: t if n == "ids" else torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
           for n, t in given.items()}  # fmt: skip
    found, wanted = run(impl, off, upstream), run(impl, given, upstream)
    close(found, tuple(t.double() for t in wanted), dtype)


@every_kernel
@pytest.mark.parametrize(("size", "dims"), [(64, 16), (33, 6)])
def test_nothing_is_written_outside(impl: str, size: int, dims: int) -> None:
    given, upstream = cast(*case(35, 3, 1, size, dims)[:2], FP32)
    with GuardZones():
        run(impl, given, upstream, rows=0)


@every_kernel
def test_parts_that_are_summed_later(impl: str) -> None:
    given, upstream = cast(*case(70, 4, 2, 16, 8)[:2], FP32)
    tensors = [given[name] for name in NAMES[:-1]]
    _, parts, _ = backward_of_results(*upstream, *tensors, None, None, None, 0, True, impl)
    assert parts.shape == (3, 4)
    run_by = run_cpp if impl == "cpu" else run_cuda
    assert torch.equal(sum_parts(run_by, [parts]), run(impl, given, upstream)[1])
