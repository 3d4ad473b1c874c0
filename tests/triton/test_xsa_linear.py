"""The gradient of xsa in the epilogue of a GEMM, in the interpreter, against float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench import candidates
from pgolf.triton_kernels import gemm
from pgolf.triton_kernels.launch import Launch, configs, intercepted
from pgolf.triton_kernels.xsa_linear import dgrad

from ..ops.guards import GuardZones
from .interpreter import addresses, last_program, touched, vast
from .operands import Operands, few_multiprocessors  # noqa: F401

BF16, FP32 = torch.bfloat16, torch.float32
KERNEL = "xsa_linear_dgrad_tma"
# Query heads, value heads, elements: groups that are half of a tile, a whole one, several in it.
GROUPINGS = [(8, 4, 64), (3, 3, 64), (4, 1, 32), (6, 6, 32), (12, 6, 16), (24, 3, 16), (16, 1, 8)]
NOT_IN_TILES = [(6, 2, 16), (2, 2, 80), (2, 1, 128), (4, 1, 64), (2, 2, 4)]


@dataclass
class Inputs(Operands):
    dout: Tensor
    w: Tensor
    y: Tensor
    v: Tensor

    def both(self, tma: bool | None = True) -> tuple[Tensor, Tensor]:
        return dgrad(self.dout, self.w, self.y, self.v, tma=tma)


def random_inputs(
    n: int, t: int, grouping: tuple[int, int, int], dim: int, dtype: torch.dtype = BF16
) -> Inputs:
    """Rows of dout and y lie apart in memory, v is a part of q, k and v."""
    heads, groups, size = grouping
    g = torch.Generator().manual_seed(n + t + dim + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    qkv = normal(n, t, heads + 2 * groups, size)
    return Inputs(
        normal(n * t, dim + 8)[:, :dim], normal(dim, heads * size),
        normal(n, t, heads + 1, size)[:, :, :heads], qkv[:, :, heads + groups :],
    )  # fmt: skip


def formula(y: Tensor, v: Tensor) -> Tensor:
    """XSA as it is defined, in the dtype of its inputs."""
    n = F.normalize(v, dim=-1, eps=1e-12).repeat_interleave(y.size(2) // v.size(2), dim=2)
    return y - (y * n).sum(-1, keepdim=True) * n


def differentiated(x: Inputs) -> tuple[Tensor, Tensor]:
    """(dy, dv) by autograd."""
    y, v = x.y.detach().requires_grad_(), x.v.detach().requires_grad_()
    return torch.autograd.grad(formula(y, v).flatten(2).flatten(0, 1) @ x.w.T, (y, v), x.dout)


def check(x: Inputs, tma: bool | None = True) -> tuple[Tensor, Tensor]:
    """The kernel in guard zones, against float64 with torch in the same dtype as the measure."""
    if not tma:  # torch on a CPU lets NaN between the rows of dout into its sums
        x = Inputs(x.dout.contiguous(), x.w, x.y, x.v)
    with GuardZones() as zones:
        got = x.in_zones(zones).both(tma)
    usual, exact = differentiated(x.to(x.y.dtype)), differentiated(x.to(torch.float64))
    for name, ours, theirs, truth in zip(("dy", "dv"), got, usual, exact, strict=True):
        assert ours.dtype == x.y.dtype and ours.shape == truth.shape and ours.is_contiguous()
        floor = torch.finfo(FP32).eps * truth.abs().max()
        error, allowed = (ours - truth).abs().max(), 3 * (theirs - truth).abs().max() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return got


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("n", "t", "dim"), [(1, 1, 8), (2, 65, 136)])
def test_against_float64(n: int, t: int, dim: int, grouping: tuple) -> None:
    check(random_inputs(n, t, grouping, dim))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("grouping", [GROUPINGS[0], *NOT_IN_TILES])
def test_matmul_and_row_kernel_against_float64(grouping: tuple, dtype: torch.dtype) -> None:
    check(random_inputs(2, 9, grouping, 33, dtype), tma=False)


def test_exact_on_small_integers() -> None:
    """Values of one element that is 1, so that nothing is rounded: every dy and dv is known."""
    heads, groups, size, dim, t = 8, 4, 64, 72, 130
    g = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).to(BF16)

    v = F.one_hot(torch.randint(size, (1, t, groups), generator=g), size).to(BF16)
    x = Inputs(whole(t, dim), whole(dim, heads * size), whole(1, t, heads, size), v)
    dz = (x.dout.double() @ x.w.double()).view(1, t, groups, 2, size)
    y, along = x.y.double().view_as(dz), v.double()[:, :, :, None]
    a, b = ((part * along).sum(-1, keepdim=True) for part in (y, dz))
    dy, dv = x.both()
    assert torch.equal(dy, (dz - b * along).view_as(x.y).to(BF16))
    assert torch.equal(dv, (2 * a * b * along - a * dz - b * y).sum(3).to(BF16))


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.5e-12, 0.999e-12, 1.001e-12, 2e-12, 1e-6, 1e6])
@pytest.mark.parametrize("grouping", [(4, 2, 64), (4, 4, 32)])
def test_norms_of_v(norm: float, grouping: tuple) -> None:
    x = random_inputs(1, 5, grouping, 16)
    x.v = (F.normalize(x.v.float(), dim=-1) * norm).to(BF16)
    check(x)


def test_values_at_the_floor_of_the_norm() -> None:
    """A norm below 1e-12, the next float32 of which the floor is: the norm counts as a constant."""
    x = random_inputs(1, 5, (4, 2, 32), 16)
    x.v = torch.zeros_like(x.v.contiguous())
    x.v[..., 3:7] = torch.tensor([-21967, -21712, 11095, 10501], dtype=torch.int16).view(BF16)
    norm = x.v.double().norm(dim=-1)
    assert (norm < 1e-12).all() and (norm.float() == torch.tensor(1e-12)).all()
    check(x)


@pytest.mark.parametrize("grouping", [(4, 2, 64), (4, 4, 32)])
def test_nothing_comes_of_zeros(grouping: tuple) -> None:
    x = random_inputs(1, 5, grouping, 16)
    for name in ("dout", "w"):
        zeros = Inputs(**vars(x) | {name: torch.zeros_like(getattr(x, name).contiguous())})
        assert not any(result.any() for result in check(zeros))
    x.v = x.v.clone()
    x.v[0, 2, 1] = 0
    dy, dv = check(x)
    share = grouping[0] // grouping[1]
    dz = (x.dout[2] @ x.w).view(grouping[0], grouping[2])[share : 2 * share]
    assert torch.equal(dy[0, 2, share : 2 * share], dz) and not dv[0, 2, 1].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["dout", "y", "v"])
@pytest.mark.parametrize("grouping", [(4, 2, 64), (4, 4, 32)])
def test_what_is_not_finite_stays_where_torch_lets_it(
    grouping: tuple, name: str, bad: float
) -> None:
    x = random_inputs(1, 130, grouping, 16)
    x.y, x.v = x.y.contiguous(), x.v.contiguous()
    at = (129, 3) if name == "dout" else (0, 129, 1, 7)
    getattr(x, name)[at] = bad
    wanted = differentiated(x.to(FP32))
    assert not all(result.isfinite().all() for result in wanted)
    for ours, theirs in zip(x.both(), wanted, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("grouping", GROUPINGS[:3])
def test_calls_are_alike_to_the_bit(grouping: tuple) -> None:
    x = random_inputs(2, 65, grouping, 72)
    assert all(map(torch.equal, check(x), check(x)))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_touched_bytes_are_inputs_and_outputs(grouping: tuple) -> None:
    x = random_inputs(2, 65, grouping, 72)
    with touched() as record:
        results = x.both()
    assert np.array_equal(record.read, addresses(*vars(x).values()))
    assert np.array_equal(record.written, addresses(*results))
    assert sum(map(len, record.writes)) == len(record.written)  # no tile is computed twice


def test_strides() -> None:
    """A matrix of its tokens goes through TMA; what is none, or not aligned, row by row."""
    x = random_inputs(2, 9, (4, 2, 64), 16)
    g = torch.Generator().manual_seed(0)
    assert kernels(x) == [KERNEL]
    by_head = x.y.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.randn(2, 9, 4, 66, generator=g).to(BF16)[..., :64]
    turned = x.w.T.contiguous().T
    wanted = x.both(tma=False)
    for other in (
        Inputs(x.dout, x.w, by_head, x.v), Inputs(x.dout, turned, x.y, x.v),
        Inputs(x.dout.T.contiguous().T, x.w, x.y, x.v),
    ):  # fmt: skip
        assert kernels(other) == ["xsa_backward_kernel"]
        torch.testing.assert_close(other.both(None), wanted, rtol=0.02, atol=0.02)
    check(Inputs(x.dout, x.w, odd, x.v), tma=None)
    check(Inputs(x.dout, x.w, x.y[:, :1].expand(2, 9, 4, 64), x.v), tma=None)


def test_without_tokens() -> None:
    x = random_inputs(1, 0, (4, 2, 32), 16)
    assert [tuple(result.shape) for result in x.both(None)] == [(1, 0, 4, 32), (1, 0, 2, 32)]


def test_offsets_beyond_int32() -> None:
    """2^30 elements between the rows of every operand, by pointer and by TMA."""
    memory = vast(2**36).view(BF16)
    x = random_inputs(1, 4, (2, 1, 64), 8)
    far = []
    for i, near in enumerate(vars(x).values()):
        strides = [2**30, 1] if near.dim() == 2 else [2**32, 2**30, 64, 1]
        far.append(memory.as_strided(near.shape, strides, 2**31 + 256 * i))
        far[-1].copy_(near)
    assert all(map(torch.equal, Inputs(*far).both(), check(x)))


def test_results_beyond_int32(monkeypatch) -> None:
    """The last tile of results of more than 2^31 elements; one row of the operands is for all."""
    t = 2**24 + 1
    x = random_inputs(1, 1, (2, 2, 64), 8)
    wanted = x.both()
    memory, starts = vast(2**34).view(BF16), iter((2**31, 2**31 + 2**12))

    def empty(shape: tuple[int, ...], **_) -> Tensor:
        return memory.as_strided(shape, (0, 128, 64, 1), next(starts))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(gemm, "tma_obstacle", lambda *_: "")  # rows that overlap
    monkeypatch.setattr(gemm, "H100_SMS", 2**31)  # a program a tile
    with intercepted(last_program):
        got = dgrad(
            x.dout.expand(t, -1), x.w, x.y.expand(1, t, 2, 64), x.v.expand(1, t, 2, 64), tma=True
        )
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours[:, -1:], theirs)


def launched(x: Inputs, tma: bool | None = None) -> list[Launch]:
    launches: list[Launch] = []
    with intercepted(launches.append):
        x.both(tma)
    return launches


def kernels(x: Inputs) -> list[str]:
    return [launch.kernel.__name__ for launch in launched(x)]


@pytest.mark.parametrize("grouping", [*GROUPINGS, *NOT_IN_TILES])
def test_the_epilogue_wherever_it_is_possible(grouping: tuple) -> None:
    possible = grouping in GROUPINGS
    assert kernels(random_inputs(1, 3, grouping, 16)) == [
        KERNEL if possible else "xsa_backward_kernel"
    ]
    for x in (random_inputs(1, 3, grouping, 20), random_inputs(1, 3, grouping, 16, FP32)):
        assert kernels(x) == ["xsa_backward_kernel"]


@pytest.mark.parametrize(
    ("grouping", "dim", "dtype", "complaint"),
    [
        ((4, 2, 64), 16, FP32, "is not bfloat16"),
        ((4, 2, 64), 20, BF16, "aligned to 16 bytes"),
        ((4, 1, 64), 16, BF16, "4 heads of 64 elements to a value are not powers of two, from 8 "
         "to 64 elements, that together have at most 128"),
        ((6, 2, 16), 16, BF16, "3 heads of 16 elements"),
    ],
)  # fmt: skip
def test_an_epilogue_that_is_not_possible(
    grouping: tuple, dim: int, dtype: torch.dtype, complaint: str
) -> None:
    with pytest.raises(ValueError, match=f"xsa_linear: tma=True is not possible: .*{complaint}"):
        random_inputs(1, 3, grouping, dim, dtype).both(tma=True)


def test_a_device_without_tma_takes_the_row_kernel(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "device_obstacle", lambda device: "it has none")
    x = random_inputs(1, 3, (4, 2, 64), 16)
    assert kernels(x) == ["xsa_backward_kernel"]
    with pytest.raises(ValueError, match="xsa_linear: tma=True is not possible: it has none"):
        x.both(tma=True)


def test_a_launch_on_meta_tensors(monkeypatch) -> None:
    """What is compiled ahead of time: an H100's grid, one program on each multiprocessor."""
    monkeypatch.undo()
    x = Inputs(*(t.to("meta") for t in vars(random_inputs(1, 2048, (8, 4, 64), 512)).values()))
    x.dout = torch.empty(2048, 512, dtype=BF16, device="meta")
    (launch,) = launched(x)
    assert launch.grid == (min(132, 16 * 4),)
    blocks = [launch.arguments[name].block_shape for name in ("dout", "w", "dy", "dv")]
    assert blocks == [[128, 64], [64, 128], [128, 64], [128, 64]]


@pytest.mark.parametrize("candidate", candidates.CANDIDATES[KERNEL])
def test_candidates_for_tuning(candidate: candidates.Candidate) -> None:
    """Against float64 as well; their programs share multiprocessors."""
    with candidates.taken(KERNEL, candidate):
        for grouping in GROUPINGS[:4]:
            x = random_inputs(1, 130, grouping, 72)
            check(x)
        assert launched(x)[0].grid == (2 * 2,)


def test_what_the_epilogue_reads_is_requested_early(monkeypatch) -> None:
    """v and half of y before the last products, the rest before anything is written."""
    x = random_inputs(1, 128, (2, 1, 64), 128)  # one tile, two blocks of dim
    x.y, x.v = x.y.contiguous(), x.v.contiguous()
    saved, events = np.union1d(addresses(x.y), addresses(x.v)), []
    load, dot = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_dot
    store = InterpreterBuilder.create_masked_store

    def noted_load(self, pointers, mask, *rest, **named):
        if wanted := int(np.isin(pointers.data[mask.data], saved).sum()):
            events.append(wanted)
        return load(self, pointers, mask, *rest, **named)

    def noted_dot(*operands):
        events.append("products")
        return dot(*operands)

    def noted_store(*operands):
        events.append("written")
        return store(*operands)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", noted_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    x.both()
    half = 128 * 64  # elements
    assert events == ["products", half, half, "products", half, *["written"] * 3]


def test_every_configuration_is_reached() -> None:
    """So that none is shipped uninterpreted."""
    (launch,) = launched(random_inputs(1, 3, (4, 2, 64), 16))
    assert [launch.config] == configs()[KERNEL]
