"""Launches that `python -m bench aot` compiles: the shapes of the record's model, on meta tensors.

Between them they have to reach every row of configs.json.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS, WIDTH, HIDDEN, HEADS, GROUPS, HEAD_DIM = 98304, 512, 1536, 8, 4, 64
BANKS = [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)]
LARGE = (4, 2048, 2048)  # where one triangle is computed and mirrored
WEIGHTS = [(1536, 512), (512, 1536)]
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call of a launcher."""

    name: str
    dtype: str  # of the operands: bf16 or fp32
    call: Callable[[], object]


def cases() -> list[Case]:
    """All of them, in a fixed order."""
    return [*_xsa(), *_mlp(), *_newton_schulz(), *_fake_quant()]


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
    from pgolf.triton_kernels import xsa

    for name, dtype in DTYPES.items():
        y = _meta(TOKENS // 2048, 2048, HEADS, HEAD_DIM, dtype=dtype)
        v = _meta(TOKENS // 2048, 2048, GROUPS, HEAD_DIM, dtype=dtype)
        yield Case(name, name, lambda y=y, v=v: xsa.xsa(y, v))
        yield Case(name, name, lambda y=y, v=v: xsa.xsa_backward(y, y, v))


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


def _newton_schulz() -> Iterator[Case]:
    from pgolf.triton_kernels.newton_schulz import newton_schulz

    for shape in [*BANKS, LARGE]:
        g = _meta(*shape, dtype=torch.float32)
        for name, dtype in DTYPES.items():
            for precision in _precisions(name):

                def iterate(g=g, dtype=dtype, precision=precision) -> None:
                    with _precision(precision):
                        newton_schulz(g, COEFFICIENTS, dtype)

                yield Case(f"{name}{precision} {'x'.join(map(str, shape))}", name, iterate)


def _fake_quant() -> Iterator[Case]:
    from pgolf.triton_kernels import fake_quant as fq

    scalar = _meta(dtype=torch.float32)
    for rows, columns in WEIGHTS:
        clip = _meta(rows, dtype=torch.float32)
        for name, dtype in DTYPES.items():
            w = _meta(rows, columns, dtype=dtype)

            def both(w=w, clip=clip) -> None:
                fq.fake_quant(w, clip, scalar, scalar, 0.0, 1, False)
                fq.fake_quant_backward(w, w, clip, scalar, scalar, 1, False)

            yield Case(f"{name} {rows}x{columns}", name, both)
