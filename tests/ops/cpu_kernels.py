"""Calls of pgolf._C's CPU kernels by pointer, into buffers amid zones that must stay untouched."""

import hashlib

import torch
from torch import Tensor

from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import Call, kernel

from .cases import small
from .guards import GuardZones

BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
# Called through their Python side; tests of their own compare numbers of threads.
ROW_OPERATORS = ("embed_smear", "qk_rope", "residual_norm")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Output:
    """A contiguous tensor amid guard zones that starts on a cache line, or `offset` later."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> None:
        self.zones = GuardZones()
        self.tensor = self.zones.tensor(shape, dtype, offset=offset)

    def result(self) -> Tensor:
        """What was written, once the guards are seen to hold."""
        self.zones.check()
        return self.tensor


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a (N, T, heads, d) tensor whose rows are contiguous."""
    assert x.stride(-1) == 1 or x.size(-1) <= 1
    return x.stride()[:3]


def xsa(kernels, y: Tensor, v: Tensor, threads: int = 1, offset: int = 0) -> Tensor:
    n, t, h, d = y.shape
    z = Output(y.shape, y.dtype, offset)
    kernels.xsa(
        *(x.data_ptr() for x in (y, v, z.tensor)),
        *(CODES[y.dtype], n, t, h, v.size(2), d, strides(y), strides(v), threads),
    )
    return z.result()


def xsa_backward(
    kernels, dz: Tensor, y: Tensor, v: Tensor, threads: int = 1, offset: int = 0
) -> tuple[Tensor, Tensor]:
    n, t, h, d = y.shape
    dy, dv = Output(y.shape, y.dtype, offset), Output(v.shape, v.dtype, offset)
    kernels.xsa_backward(
        *(x.data_ptr() for x in (dz, y, v, dy.tensor, dv.tensor)),
        *(CODES[y.dtype], n, t, h, v.size(2), d, strides(dz), strides(y), strides(v), threads),
    )
    return dy.result(), dv.result()


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def leaky_relu2(
    kernels,
    pre: Tensor,
    slope: float,
    rstd: Tensor | None = None,
    threads: int = 1,
    in_place: bool = False,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    rows, cols = pre.shape
    post = Output(pre.shape, pre.dtype, offset)
    bits = Output((rows, -(-cols // 32)), torch.int32)
    if in_place:
        pre = post.tensor.copy_(pre)
    kernels.leaky_relu2(
        *(pre.data_ptr(), post.tensor.data_ptr(), bits.tensor.data_ptr(), pointer(rstd)),
        *(CODES[pre.dtype], rows, cols, slope, threads),
    )
    return post.result(), bits.result()


def leaky_relu2_backward(
    kernels,
    dpost: Tensor,
    post: Tensor,
    bits: Tensor,
    slope: float,
    rstd: Tensor | None = None,
    threads: int = 1,
    in_place: bool = False,
    offset: int = 0,
) -> Tensor:
    dpre = Output(post.shape, post.dtype, offset)
    if in_place:
        dpost = dpre.tensor.copy_(dpost)
    kernels.leaky_relu2_backward(
        *(dpost.data_ptr(), post.data_ptr(), bits.data_ptr(), pointer(rstd)),
        *(dpre.tensor.data_ptr(), CODES[post.dtype], *post.shape, slope, threads),
    )
    return dpre.result()


def normalize(
    kernels,
    g: Tensor,
    dtype: torch.dtype,
    row_norm: bool = False,
    safety: float = 1.0,
    threads: int = 1,
) -> Tensor:
    x = Output(g.shape, dtype)
    kernels.newton_schulz_normalize(
        *(g.data_ptr(), x.tensor.data_ptr(), CODES[g.dtype], CODES[dtype]),
        *(*g.shape, g.stride(), row_norm, safety, threads),
    )
    return x.result()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def weight_cast(
    kernels,
    w: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    grid: tuple | None = None,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    threads: int = 1,
    offset: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """(out, step) of one matrix; grid is (clip_factor, bits, on)."""
    clip_factor, bits, on = grid or (None, 0, True)
    bits, on = torch.tensor(float(bits)), torch.tensor(float(on))
    out = Output(w.shape, dtype, offset)
    step = Output(w.shape[:1], wide(w.dtype)) if grid else None
    kernels.weight_cast(
        [(*w.shape, w.data_ptr(), w.stride(0), *map(pointer, (scale, clip_factor, bits)),
          out.tensor.data_ptr(), pointer(step and step.tensor))],
        *(on.data_ptr(), CODES[w.dtype], CODES[dtype], floor, multiple, full_range, threads),
    )  # fmt: skip
    return out.result(), step and step.result()


def weight_cast_backward(
    kernels,
    dout: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    grid: tuple | None = None,
    multiple: int = 1,
    full_range: bool = False,
    clip_mask: bool = False,
    threads: int = 1,
    offset: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """(dw, dscale) of one matrix; grid is (step, bits, on)."""
    step, bits, on = grid or (None, 0, True)
    bits, on = torch.tensor(float(bits)), torch.tensor(float(on))
    dw = Output(w.shape, w.dtype, offset)
    dscale = None if scale is None else Output(w.shape[:1], scale.dtype)
    kernels.weight_cast_backward(
        [(*w.shape, dout.data_ptr(), dout.stride(0), w.data_ptr(), w.stride(0),
          *map(pointer, (scale, step, bits)), dw.tensor.data_ptr(),
          pointer(dscale and dscale.tensor))],
        *(on.data_ptr(), CODES[w.dtype], CODES[dout.dtype], multiple, full_range, clip_mask),
        threads,
    )  # fmt: skip
    return dw.result(), dscale and dscale.result()


def fake_quant(
    kernels,
    w: Tensor,
    clip_factor: Tensor,
    bits: int,
    on: bool = True,
    floor: float = 0.0,
    multiple: int = 1,
    full_range: bool = False,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    grid = (clip_factor, bits, on)
    return weight_cast(kernels, w, w.dtype, None, grid, floor, multiple, full_range, threads)


def fake_quant_backward(
    kernels,
    dout: Tensor,
    w: Tensor,
    scale: Tensor,
    bits: int,
    on: bool = True,
    multiple: int = 1,
    full_range: bool = False,
    threads: int = 1,
) -> Tensor:
    rest = (multiple, full_range, True, threads)
    return weight_cast_backward(kernels, dout, w, None, (scale, bits, on), *rest)[0]


def samples(kernels, threads: int) -> list[Tensor]:
    """Results of every kernel on inputs that are large enough for five threads, and ragged."""
    results = []
    for dtype in DTYPES:
        y, dz = randn(2, 701, 6, 72, dtype=dtype), randn(2, 701, 6, 72, dtype=dtype, seed=1)
        v = randn(2, 701, 3, 72, dtype=dtype, seed=2)
        results += [xsa(kernels, y, v, threads)]
        results += xsa_backward(kernels, dz, y, v, threads)
        pre, dpost = randn(701, 999, dtype=dtype), randn(701, 999, dtype=dtype, seed=1)
        post, bits = leaky_relu2(kernels, pre, 0.5, threads=threads)
        results += [post, bits]
        results += [leaky_relu2_backward(kernels, dpost, post, bits, 0.5, threads=threads)]
        g = randn(3, 333, 777, dtype=dtype)
        for to in DTYPES:
            results += [normalize(kernels, g, to, True, threads=threads)]
        factor = torch.full((701,), 0.8)
        results += fake_quant(kernels, pre, factor, 6, threads=threads)
        results += [fake_quant_backward(kernels, dpost, pre, results[-1], 6, threads=threads)]
        for name in ROW_OPERATORS:
            run = kernel(OPERATORS[name], "cpu")
            calls = [Call.of(OPERATORS[name], s, dtype) for s in small(OPERATORS[name])]
            results += [t for call in calls for t in call.run(run)]
        grid, scale = (factor, 5, True), randn(701, dtype=wide(dtype))
        out, step = weight_cast(kernels, pre, BF16, scale, grid, threads=threads)
        grid, dout = (step, 5, True), dpost.to(BF16)
        results += [out, *weight_cast_backward(kernels, dout, pre, scale, grid, threads=threads)]
    return results


def digest(tensors: list[Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.flatten().view(torch.uint8).numpy())
    return state.hexdigest()
