"""Launches that `python -m bench aot` compiles: the shapes of the record's model, on meta tensors.

Between them they have to reach every row of configs.json.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.device import DTYPES

TOKENS, WIDTH, HIDDEN, HEADS, GROUPS = 98304, 512, 1536, 8, 4
HEAD_DIMS = (64, 32, 128, 256)  # the model has 64
BANKS = [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)]
SHARES = [(-(-count // 8), *sides) for count, *sides in BANKS]  # the first rank's of eight
LARGE = (4, 2048, 2048)  # where one triangle is computed and mirrored
# The model's, and rows of each length that has a configuration of its own.
WEIGHTS = [(1536, 512), (512, 1536), (512, 1024), (512, 4096), (512, 16384), (512, 32768)]
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5


@dataclass(frozen=True)
class Case:
    """One call of a launcher."""

    name: str
    dtype: str  # of the operands: bf16 or fp32
    call: Callable[[], object]


def cases() -> list[Case]:
    """All of them, in a fixed order."""
    return [
        *_xsa(), *_mlp(), *_xsa_linear(), *_linear_residual(), *_norm_mlp(), *_linear_qk_rope(),
        *_newton_schulz(), *_fake_quant(),
    ]  # fmt: skip


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _precisions(dtype: str) -> list[str]:
    """Settings of float32 matmuls that lead to different kernels, as suffixes of a case's name."""
    return [" ieee", " tf32"] if dtype == "fp32" else [""]


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == " tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _xsa() -> Iterator[Case]:
    from pgolf.triton_kernels.xsa import xsa, xsa_backward

    for size in HEAD_DIMS:
        for name, dtype in DTYPES.items():
            y = _meta(TOKENS // 2048, 2048, HEADS, size, dtype=dtype)
            v = _meta(TOKENS // 2048, 2048, GROUPS, size, dtype=dtype)

            def both(y=y, v=v) -> None:
                xsa(y, v)
                xsa_backward(y, y, v)

            yield Case(f"{name} d={size}", name, both)


def _mlp() -> Iterator[Case]:
    from pgolf.triton_kernels import leaky_relu2_mlp as mlp

    for name, dtype in DTYPES.items():
        h, hidden = _meta(TOKENS, WIDTH, dtype=dtype), _meta(TOKENS, HIDDEN, dtype=dtype)
        w_up, w_down = _meta(HIDDEN, WIDTH, dtype=dtype), _meta(WIDTH, HIDDEN, dtype=dtype)
        bits = _meta(TOKENS, HIDDEN // 32, dtype=torch.int32)
        for precision in _precisions(name):
            for rstd in (None, _meta(TOKENS, dtype=torch.float32)):
                for tma in (True, False) if name == "bf16" else (False,):

                    def both(
                        h=h, hidden=hidden, w_up=w_up, w_down=w_down, bits=bits,
                        precision=precision, rstd=rstd, tma=tma,
                    ) -> None:  # fmt: skip
                        with _precision(precision):
                            mlp.up(h, w_up, 0.5, rstd, tma=tma)
                            mlp.down_dgrad(h, w_down, hidden, bits, 0.5, rstd, tma=tma)

                    yield Case(name + precision + (" rstd" if rstd is not None else ""), name, both)


def _xsa_linear() -> Iterator[Case]:
    """Heads of the model's and of other sizes, in groups as large as a tile of any."""
    from pgolf.triton_kernels.xsa_linear import dgrad

    bf16 = torch.bfloat16
    dout = _meta(TOKENS, WIDTH, dtype=bf16)
    for size, share in ((64, 2), (64, 1), (32, 4), (32, 1), (16, 8)):
        heads = WIDTH // size
        y = _meta(TOKENS // 2048, 2048, heads, size, dtype=bf16)
        v = _meta(TOKENS // 2048, 2048, heads // share, size, dtype=bf16)
        w = _meta(WIDTH, WIDTH, dtype=bf16)
        yield Case(
            f"bf16 d={size}, {share} heads to a value", "bf16",
            lambda y=y, v=v, w=w: dgrad(dout, w, y, v, tma=True),
        )  # fmt: skip


def _linear_residual() -> Iterator[Case]:
    """As the output projection of attention has it, and that of the MLP in all kinds of layers."""
    from pgolf.triton_kernels.linear_residual import linear_residual

    bf16 = torch.bfloat16
    x, factors = _meta(TOKENS, WIDTH, dtype=bf16), _meta(WIDTH, dtype=torch.float32)
    joined = {"x0": x, "of_x": factors, "of_x0": factors}
    total = {"x0": x, "of_total": factors, "of_x0": factors, "keep_total": True}
    skip = {"skip": x, "of_skip": factors}
    for label, inner, added in (
        ("", WIDTH, {}),
        (" joined", HIDDEN, joined),
        (" joined, skip", HIDDEN, {**joined, **skip}),
        (" skip", HIDDEN, skip),
        (" total", HIDDEN, total),
        (" total, skip", HIDDEN, {**total, **skip}),
    ):
        z, w = _meta(TOKENS, inner, dtype=bf16), _meta(WIDTH, inner, dtype=bf16)
        yield Case(
            f"bf16{label}", "bf16",
            lambda z=z, w=w, added=added: linear_residual(z, w, x, 0.5, 1e-6, **added, tma=True),
        )  # fmt: skip


def _norm_mlp() -> Iterator[Case]:
    """With and without factors of x."""
    from pgolf.triton_kernels.norm_mlp import gradient

    bf16, fp32 = torch.bfloat16, torch.float32
    x, post = _meta(TOKENS, WIDTH, dtype=bf16), _meta(TOKENS, HIDDEN, dtype=bf16)
    w_up, w_down = _meta(HIDDEN, WIDTH, dtype=bf16), _meta(WIDTH, HIDDEN, dtype=bf16)
    bits, factor = _meta(TOKENS, HIDDEN // 32, dtype=torch.int32), _meta(TOKENS, dtype=fp32)
    for label, x_scale in (("", None), (", factors of x", _meta(WIDTH, dtype=fp32))):
        yield Case(
            f"bf16 with norm{label}", "bf16",
            lambda x_scale=x_scale: gradient(
                x, x, x, factor, w_up, w_down, post, bits, 0.5, 0.01, x_scale, tma=True
            ),
        )  # fmt: skip


def _linear_qk_rope() -> Iterator[Case]:
    """With and without a factor, values of their own or of a table, and more rotated pairs."""
    from pgolf.triton_kernels.linear_qk_rope import linear_qk_rope

    bf16, fp32 = torch.bfloat16, torch.float32
    batch, time, size = TOKENS // 2048, 2048, WIDTH // HEADS
    x = _meta(batch, time, WIDTH, dtype=bf16)
    w = _meta((HEADS + 2 * GROUPS) * size, WIDTH, dtype=bf16)
    gain, factor = _meta(HEADS, dtype=fp32), _meta(batch, time, dtype=fp32)
    values = _meta(batch, time, GROUPS * size, dtype=bf16)
    table, ids = _meta(1024, GROUPS * size, dtype=bf16), _meta(batch, time, dtype=torch.int64)
    for label, pairs, *added in (
        ("", 8, None, None, None), (" factor", 8, factor, None, None),
        (" factor, values", 8, factor, values, None), (" factor, table", 8, factor, table, ids),
        (" factor, 16 pairs", 16, factor, None, None),
        (" factor, table, 16 pairs", 16, factor, table, ids),
    ):  # fmt: skip
        angles = _meta(time, pairs, dtype=fp32)
        yield Case(
            f"bf16{label}", "bf16",
            lambda angles=angles, added=added: linear_qk_rope(
                x, w, angles, angles, gain, *added, HEADS, GROUPS, 1e-6
            ),
        )  # fmt: skip


def _newton_schulz() -> Iterator[Case]:
    from pgolf.triton_kernels.newton_schulz import newton_schulz, newton_schulz_all

    groups = {"banks": BANKS, "a rank's share of banks": SHARES}
    groups |= {_times(shape): [shape] for shape in (BANKS[2], SHARES[0], LARGE)}
    for label, shapes in groups.items():
        gs = [_meta(*shape, dtype=torch.float32) for shape in shapes]
        for name, dtype in DTYPES.items():
            for precision in _precisions(name):

                def iterate(gs=gs, dtype=dtype, precision=precision) -> None:
                    with _precision(precision):
                        newton_schulz_all(gs, COEFFICIENTS, dtype)

                yield Case(f"{name}{precision} {label}", name, iterate)
    for label, shapes in (("banks", BANKS), ("a rank's share of banks", SHARES)):
        gs = [_meta(*shape, dtype=torch.bfloat16) for shape in shapes]
        sums = [_meta(*shape[:2], dtype=torch.float32) for shape in shapes]
        yield Case(
            f"bf16 {label}, sums of squares known", "bf16",
            lambda gs=gs, sums=sums: newton_schulz_all(
                gs, COEFFICIENTS, torch.bfloat16, squares=sums
            ),
        )  # fmt: skip
    g = _meta(*BANKS[0], dtype=torch.bfloat16)
    name = f"bf16 {_times(BANKS[0])} from bf16, rows normalised"
    yield Case(name, "bf16", lambda: newton_schulz(g, COEFFICIENTS, torch.bfloat16, row_norm=True))


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _fake_quant() -> Iterator[Case]:
    from pgolf.triton_kernels.fake_quant import (
        MATRICES,
        fake_quant,
        fake_quant_all,
        fake_quant_backward,
    )

    scalar = _meta(dtype=torch.float32)
    grids = [(shape, 1, False) for shape in WEIGHTS] + [(WEIGHTS[0], 4, True)]
    for (rows, columns), multiple, full_range in grids:
        clip = _meta(rows, dtype=torch.float32)
        for name, dtype in DTYPES.items():
            w = _meta(rows, columns, dtype=dtype)

            def both(w=w, clip=clip, multiple=multiple, full_range=full_range) -> None:
                fake_quant(w, clip, scalar, scalar, 0.0, multiple, full_range)
                fake_quant_backward(w, w, clip, scalar, scalar, multiple, full_range)

            grid = f", full range of multiples of {multiple}" if full_range else ""
            yield Case(f"{name} {rows}x{columns}{grid}", name, both)
    # One layer's weights and more, from fp32 to bf16 as the model uses them: no scales.
    ws = [_meta(*WEIGHTS[i % 2], dtype=torch.float32) for i in range(MATRICES)]
    clips = [_meta(w.size(0), dtype=torch.float32) for w in ws]
    scalars = [scalar] * MATRICES
    yield Case(
        f"fp32 to bf16, {MATRICES} matrices", "bf16",
        lambda: fake_quant_all(
            ws, clips, scalars, scalar, 0.0, 1, False, torch.bfloat16, with_scales=False
        ),
    )  # fmt: skip
