"""weight_cast: order of grid, scale and cast, lists of matrices, layouts, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from pgolf.ops import fake_quant, weight_cast, weight_cast_all
from pgolf.ops.operator import OPERATORS

from . import cpu_kernels as call
from .cases import implementations

BF16 = torch.bfloat16
ONE, ZERO = torch.ones(()), torch.zeros(())
IMPLS = implementations(OPERATORS["weight_cast"])
every_impl = pytest.mark.parametrize("impl", IMPLS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return call.randn(*shape, dtype=dtype, seed=seed) * 0.05


def results(
    ws: list[Tensor], scales: list, grids: list, impl: str, **options
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of what has one) of matrices with (clip_factor, bits) or None."""
    ws = [w.detach().requires_grad_() for w in ws]
    scales = [None if s is None else s.detach().requires_grad_() for s in scales]
    clips, bits = ([grid and grid[i] for grid in grids] for i in (0, 1))
    outs = weight_cast_all(ws, scales, clips, bits, impl=impl, **{"on": ONE, **options})
    upstream = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in outs]
    leaves = [*ws, *(s for s in scales if s is not None)]
    return [out.detach() for out in outs], list(torch.autograd.grad(outs, leaves, upstream))


def assert_alike(mine: tuple, theirs: tuple, matrices: int) -> None:
    """Bit for bit, but for the gradients of scales, which are sums."""
    for a, b in zip(mine[0] + mine[1][:matrices], theirs[0] + theirs[1][:matrices], strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)
    for a, b in zip(mine[1][matrices:], theirs[1][matrices:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_the_grid_comes_before_the_scale_and_the_cast_last(impl: str) -> None:
    w, scale = randn(5, 40), torch.tensor([1.0, -2.5, 0.0, 1e-3, 3.1])
    factor = torch.full((5,), 0.7)
    grid = dict(clip_factor=factor, bits=5, on=True)
    q = fake_quant(w, factor, 5, True, impl="reference")
    out = weight_cast(w, scale, **grid, dtype=BF16, impl=impl)
    assert torch.equal(out, (scale[:, None] * q).to(BF16))
    w.requires_grad_(), scale.requires_grad_()
    dout = randn(5, 40, seed=1)
    dw, dscale = torch.autograd.grad(weight_cast(w, scale, **grid, impl=impl), (w, scale), dout)
    assert torch.equal(dw, scale.detach()[:, None] * dout), "straight through"
    torch.testing.assert_close(dscale, (dout * q).sum(1), rtol=1e-5, atol=1e-6)
    out = weight_cast(w, scale, factor, 5, True, clip_mask=True, impl=impl)
    (masked,) = torch.autograd.grad(out, w, dout)
    clipped = w.abs() > 0.75 * w.abs().amax(1, keepdim=True)
    assert clipped.any() and not masked[clipped].any()


# Of every kind; the last one is longer than the registers of a warp take at once.
SHAPES = [(3, 8), (5, 40), (2, 33), (1, 1), (4, 512), (0, 8), (2, 3100)]
SCALED = [True, False, True, False, True, True, True]
GRIDDED = [True, True, False, False, True, True, True]


@every_impl
@pytest.mark.parametrize("clip_mask", [False, True])
@pytest.mark.parametrize(("dtype", "to"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_matrices_of_every_kind_in_one_call(impl, clip_mask, dtype, to) -> None:
    ws = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    scales = [torch.linspace(-1, 2, len(w)) if s else None for w, s in zip(ws, SCALED, strict=True)]
    grids = [
        (torch.full((len(w),), 0.8), torch.tensor(4.0 + i % 5)) if gridded else None
        for i, (w, gridded) in enumerate(zip(ws, GRIDDED, strict=True))
    ]
    for on in (ONE, ZERO):
        options = dict(clip_mask=clip_mask, dtype=to, on=on)
        mine, theirs = (results(ws, scales, grids, i, **options) for i in (impl, "reference"))
        assert_alike(mine, theirs, len(ws))


@every_impl
def test_more_matrices_than_a_launch_takes(impl: str) -> None:
    ws = [randn(1, 4, seed=i) for i in range(100)]
    scales = [torch.tensor([float(i)]) for i in range(100)]
    mine, theirs = (results(ws, scales, [None] * 100, i) for i in (impl, "reference"))
    assert_alike(mine, theirs, 100)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_any_address_and_row_stride(impl: str, dtype: torch.dtype) -> None:
    """What cannot be moved 16 bytes at a time gives the bits of what can."""
    w, scale = randn(6, 64, dtype=dtype), torch.linspace(0.5, 2, 6)
    grid = (torch.full((6,), 0.9), torch.tensor(6.0))
    expected = results([w], [scale], [grid], impl, clip_mask=True)
    for columns, offset in ((64, 1), (65, 0), (72, 3)):
        wide = torch.zeros(6 * columns + offset, dtype=dtype)[offset:].view(6, columns)
        wide[:, :64] = w
        found = results([wide[:, :64]], [scale], [grid], impl, clip_mask=True)
        assert_alike(found, expected, 1)
    step = torch.zeros(12)[::2].copy_(scale)
    assert_alike(results([w], [step], [grid], impl, clip_mask=True), expected, 1)


@every_impl
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [3, 1999])
def test_a_row_that_is_not_finite(impl: str, bad: float, column: int) -> None:
    w = randn(4, 2000)
    w[2, column] = bad
    grid = (torch.ones(4), torch.tensor(6.0))
    (out,), (dw, dscale) = results([w], [torch.ones(4)], [grid], impl, clip_mask=True)
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()
    assert not dw[2].any() and dscale[2].isnan() and dscale[[0, 1, 3]].isfinite().all()
    (out,), _ = results([w], [None], [None], impl)
    assert torch.equal(out, w) or out[2, column].isnan()


@every_impl
def test_ties_and_every_binade(impl: str) -> None:
    clips = torch.tensor([[2.0**e * m] for e in range(-40, 40) for m in (1.0, 1.3, 1.9990234)])
    w = torch.cat([clips * (torch.arange(-31, 31) + half) / 31 for half in (0, 0.5)], 1)
    for k in (4, 6):
        grid = (torch.ones(len(w)), torch.tensor(float(k)))
        both = (results([w], [None], [grid], i, clip_mask=True) for i in (impl, "reference"))
        assert_alike(*both, 1)


@pytest.mark.skipif("cuda" not in IMPLS, reason="there are no CUDA kernels")
@pytest.mark.parametrize("bits", [3.0, 9.0, 5.5, math.nan])
def test_a_gpu_answers_unknown_bits_with_nan(bits: float) -> None:
    w, scale = randn(3, 16), torch.ones(3)
    grid = (torch.ones(3), torch.tensor(bits))
    for on in (ONE, ZERO):
        (out,), gradients = results([w], [scale], [grid], "cuda", clip_mask=True, on=on)
        assert all(t.isnan().all() for t in (out, *gradients))


@every_impl
def test_matrices_that_nothing_flows_back_to(impl: str) -> None:
    ws = [randn(3, 8, seed=i).requires_grad_() for i in range(3)]
    scales = [torch.ones(3, requires_grad=True), None, torch.ones(3, requires_grad=True)]
    outs = weight_cast_all(ws, scales, impl=impl)
    (outs[1].sum() + outs[2].sum()).backward()
    assert (ws[1].grad == 1).all() and (ws[2].grad == 1).all() and ws[0].grad is None
    assert scales[0].grad is None and torch.allclose(scales[2].grad, ws[2].detach().sum(1))


@every_impl
def test_lists_compile_in_one_graph(impl: str) -> None:
    """A block's matrices, as a model casts them: its output projections have a scale."""
    ws = [randn(4, 8, seed=i).requires_grad_() for i in range(3)]
    scale = torch.linspace(1, 2, 4).requires_grad_()
    clips, bits = [torch.ones(4), None, torch.ones(4)], [torch.tensor(6.0), None, torch.tensor(5.0)]

    def total(*ws: Tensor) -> Tensor:
        scales = [None, scale, scale]
        outs = weight_cast_all(ws, scales, clips, bits, ONE, dtype=BF16, impl=impl)
        return sum((i + 1) * out.float().square().sum() for i, out in enumerate(outs))

    leaves = [*ws, scale]
    eager = torch.autograd.grad(total(*ws), leaves)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(torch.autograd.grad(compiled(*ws), leaves), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


W, ONES = torch.ones(4, 8), torch.ones(4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("w is (8,): it has to be", dict(w=W[0])),
        ("w is torch.int64: use a float dtype", dict(w=W.long())),
        ("scale is torch.float32 (3,): for these rows it has to be torch.float32 (4,)",
         dict(scale=ONES[:3])),
        ("scale is torch.float64 (4,)", dict(scale=ONES.double())),
        ("scale is on meta, w on cpu", dict(scale=ONES.to("meta"))),
        ("a grid takes clip_factor, bits and on", dict(clip_factor=ONES)),
        ("a grid takes clip_factor, bits and on", dict(bits=6, on=True)),
        ("a grid takes clip_factor, bits and on", dict(clip_factor=ONES, bits=6)),
        ("w is (4, 0): rows of no elements", dict(w=W[:, :0], clip_factor=ONES, bits=6, on=True)),
        ("bits=9: it has to be a whole number", dict(clip_factor=ONES, bits=9, on=True)),
        ("multiple=0: it has to be 1 or more", dict(multiple=0)),
        ("floor=nan: it has to be 0 or more", dict(floor=math.nan)),
        ("dtype=torch.int8: it has to be a float dtype", dict(dtype=torch.int8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_what_does_not_fit_is_refused(impl: str, message: str, arguments: dict) -> None:
    with pytest.raises(ValueError) as caught:
        weight_cast(**{"w": W, **arguments}, impl=impl)
    assert str(caught.value).startswith(f"weight_cast: {message}")


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="the list of matrices is empty"):
        weight_cast_all([])
    with pytest.raises(ValueError, match="matrix 1 is torch.bfloat16 and matrix 0"):
        weight_cast_all([W, W.to(BF16)])
    with pytest.raises(ValueError, match="zip"):
        weight_cast_all([W, W], [ONES])


# ---- the kernel by pointers


@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_written_beside_the_outputs(kernels, offset: int) -> None:
    for rows, columns in ((1, 1), (3, 72), (33, 33)):
        w, scale = randn(rows, columns), torch.linspace(0.5, 2, rows)
        grid = (torch.ones(rows), 6, True)
        out, step = call.weight_cast(kernels, w, BF16, scale, grid, offset=offset)
        expected = weight_cast(w, scale, *grid, dtype=BF16, impl="reference")
        assert torch.equal(out, expected)
        grid = (step, 6, True)
        dw, dscale = call.weight_cast_backward(kernels, out, w, scale, grid, offset=offset)
        assert torch.equal(dw, scale[:, None] * out.float()) and dscale.isfinite().all()


FORWARD = dict(rows=4, cols=8, w=1, w_stride=8, scale=1, clip_factor=1, bits=6.0, out=1, step=1)
BACKWARD = dict(
    rows=4, cols=8, dout=1, dout_stride=8, w=1, w_stride=8, scale=1, step=1, bits=6.0, dw=1,
    dscale=1,
)  # fmt: skip
SHARED = {"from_dtype": 0, "to_dtype": 0, "multiple": 1, "full_range": False, "threads": 1}


def refusal(kernels, name: str, matrix: dict, **changed) -> str:
    """What the kernel says to these values of one matrix, where 1 is an address."""
    room = torch.zeros(8192)
    bits = torch.tensor(matrix["bits"] or 0.0)
    matrix = {
        n: room.data_ptr() if x == 1 and n not in ("rows", "cols") else x for n, x in matrix.items()
    }
    matrix["bits"] = bits.data_ptr() if matrix["bits"] else 0
    rest = {"floor": 0.0} if name == "weight_cast" else {"clip_mask": True}
    values = {"on": ONE.data_ptr()} | SHARED | rest | changed
    with pytest.raises(ValueError) as caught:
        getattr(kernels, name)(matrices=[tuple(matrix.values())], **values)
    assert not room.any(), "a refused call wrote"
    return str(caught.value)


def test_kernels_refuse_what_they_cannot_address(kernels) -> None:
    huge = 2**62
    for name, good, pointers in (
        ("weight_cast", FORWARD, ("w", "bits", "out")),
        ("weight_cast_backward", BACKWARD, ("dout", "w", "bits", "dw")),
    ):
        for pointer in pointers:
            message = refusal(kernels, name, good | {pointer: 0})
            assert message.startswith(f"{pointer} is a null pointer: it has to hold ")
        assert refusal(kernels, name, good, on=0).startswith("on is a null pointer")
        assert refusal(kernels, name, good | {"rows": -1}) == "rows is -1: a size is not negative"
        assert "with the other sizes" in refusal(kernels, name, good | {"rows": huge})
        assert "w_row_stride is -8: a stride" in refusal(kernels, name, good | {"w_stride": -8})
        assert "leads beyond what can be" in refusal(kernels, name, good | {"w_stride": huge})
        for bits in (3.0, 9.0, 5.5, math.nan):
            message = refusal(kernels, name, good | {"bits": bits})
            assert message.endswith("it has to be a whole number, 4 to 8")
        for argument, value, remedy in (
            ("threads", 0, "it has to be at least 1"),
            ("multiple", 0, "it has to be at least 1"),
            ("from_dtype", 3, "it has to be 0 (fp32), 1 (bf16) or 2 (fp64)"),
            ("to_dtype", 2, "it has to be bf16 or what these weights are computed in"),
        ):
            assert refusal(kernels, name, good, **{argument: value}).endswith(remedy)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32, torch.float16])
def test_results_are_written_where_they_are_wanted(impl: str, to: torch.dtype) -> None:
    """The numbers of a call without `into` and its gradients, with the memory around left alone."""
    ws = [randn(5, 8), randn(3, 17, seed=1)]
    scales, clips, bits = [randn(5, seed=2), None], [None, torch.full((3,), 0.7)], [None, 5]
    named = {"on": torch.tensor(1.0), "clip_mask": True, "dtype": to, "impl": impl}
    memory = torch.full((200,), 7.0, dtype=to)
    into = [memory[8:48].view(5, 8), memory[64:115].view(3, 17)]
    found = []
    for places in (None, into):
        leaves = [t.clone().requires_grad_() for t in (*ws, scales[0])]
        lists = (leaves[:2], [leaves[2], None], clips, bits)
        outs = weight_cast_all(*lists, **named, into=places)
        upstream = [randn(*out.shape, seed=9).to(to) for out in outs]
        gradients = torch.autograd.grad(outs, leaves, upstream)
        found.append([*(outs if places is None else places), *gradients])
    assert all(map(torch.equal, *found))
    untouched = torch.cat((memory[:8], memory[48:64], memory[115:]))
    assert (untouched == 7).all()
    for wrong in (into[1].float().double(), into[0], into[1].to("meta")):
        with pytest.raises(ValueError, match=r"weight_cast: into\[1\] is torch"):
            weight_cast_all(*lists, **named, into=[into[0], wrong])
    with pytest.raises(ValueError, match="two tensors of into share memory"):
        weight_cast_all(*lists, **named, into=[into[0], memory[40:91].view(3, 17)])
    if to is torch.float32:
        with pytest.raises(ValueError, match=r"into\[1\] shares memory with an input"):
            weight_cast_all(*lists, **named, into=[into[0], leaves[1].detach()])
    torch._dynamo.reset()
    memory.fill_(7.0)
    compiled = torch.compile(weight_cast_all, fullgraph=True, backend="eager")
    compiled(*lists, **named, into=into)
    assert all(map(torch.equal, into, found[0][:2]))
