"""Rows of tables that kernels look up by id, and the gradients of these tables."""

import pytest
import torch
from torch import Tensor

from pgolf.ops import qk_rope_kernels
from pgolf.ops.embed_smear import embed_smear
from pgolf.ops.launch import run_cpp, run_cuda
from pgolf.ops.operator import OPERATORS
from pgolf.ops.qk_rope import qk_rope, rope_table
from pgolf.ops.token_sums import shared_orders, token_sums

from .cases import implementations
from .guards import GuardZones

KERNELS = implementations(OPERATORS["qk_rope"])
RUNS = {"cpu": run_cpp, "cuda": run_cuda}
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def drawn(batch: int, time: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(rows, (batch, time), generator=torch.Generator().manual_seed(seed))


def expected(ids: Tensor, rows: int, x: Tensor, divisor: Tensor | None) -> Tensor:
    x = x.double() if divisor is None else x.double() / divisor.double()[..., None]
    return torch.zeros(rows, x.size(2)).double().index_add(0, ids.flatten(), x.flatten(0, 1))


IDS = [(drawn(2, 70, 5), 9), (torch.zeros(3, 90).long(), 2), (drawn(1, 3, 300), 300)]


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ids", "rows"), IDS)
@pytest.mark.parametrize("width", [1, 33, 64, 296])
def test_sums_of_tokens(impl: str, dtype: torch.dtype, ids: Tensor, rows: int, width: int) -> None:
    """Packed and strided rows, with and without divisors; ids that no token has are zero."""
    g = torch.Generator().manual_seed(width)
    whole = torch.randn(*ids.shape, 2 * width, generator=g).to(dtype)
    divisor = torch.rand(ids.shape, generator=g) - 1.5
    for x in (whole[..., width:], whole[..., :width].contiguous()):
        for of_tokens in (divisor, None):
            found = token_sums(RUNS[impl], ids, rows, x, of_tokens)
            exact = expected(ids, rows, x, of_tokens)
            assert found.dtype is dtype and found.is_contiguous()
            error = (found.double() - exact).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5


@every_kernel
@pytest.mark.parametrize("width", [7, 64])
def test_nothing_is_written_beside_the_sums(impl: str, width: int) -> None:
    ids = drawn(2, 40, 6)
    with GuardZones():
        token_sums(RUNS[impl], ids, 8, torch.randn(2, 40, width))


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA kernels")
def test_any_order_of_threads_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, x = drawn(2, 150, 4), torch.randn(2, 150, 40)
    runs = []
    for seed in range(3):
        monkeypatch.setenv("PGOLF_EMULATOR_SEED", str(seed))
        runs.append(token_sums(run_cuda, ids, 5, x))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def values(ids: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The values of qk_rope for rows of a table of 4 by id, and the gradient of the table."""
    batch, time = ids.shape
    g = torch.Generator().manual_seed(1)
    qkv, table = torch.randn(batch, time, 4 * 8, generator=g), torch.randn(4, 8, generator=g)
    table.requires_grad_()
    angles = rope_table(time, 4, 100.0)
    v = qk_rope(qkv, *angles, torch.ones(2), 2, 1, value=table, value_ids=ids, impl=impl)[2]
    return v, torch.autograd.grad(v.sum(), table)[0]


def embedded(ids: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """x of embed_smear for bigrams from a table of 4 by id, and the gradient of that table."""
    g = torch.Generator().manual_seed(2)
    table, bigrams = torch.randn(5, 8, generator=g), torch.randn(4, 8, generator=g)
    bigrams.requires_grad_()
    tokens = drawn(*ids.shape, 5)
    x = embed_smear(tokens, table, bigrams, bigram_ids=ids, impl=impl)
    upstream = torch.randn(x.shape, generator=g)
    return x, torch.autograd.grad(x.nan_to_num(), bigrams, upstream)[0]


@every_kernel
@pytest.mark.parametrize(("call", "name"), [(values, "value_ids"), (embedded, "bigram_ids")])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_an_id_that_the_table_does_not_have(impl: str, call, name: str, wrong: int) -> None:
    """An error on a CPU; on a GPU its token is NaN, and nothing is read beyond the table."""
    ids = drawn(2, 9, 4)
    good, of_good = call(ids, impl)
    ids[1, 3] = wrong
    if impl == "cpu":
        with pytest.raises(ValueError, match=rf"{name}\[12\] is {wrong}: the table has 4 rows"):
            call(ids, impl)
        return
    found, gradient = call(ids, impl)
    assert found[1, 3].isnan().all()
    others = torch.ones(2, 9).bool()
    others[1, 3] = False
    assert torch.equal(found[others], good[others])
    assert gradient.isfinite().all() and of_good.isfinite().all()


@every_kernel
def test_an_order_that_is_given_changes_no_bit(impl: str) -> None:
    ids, bigram_ids = drawn(2, 30, 4), drawn(2, 30, 5, seed=1)
    order, of_bigrams = shared_orders([(ids, 4), (bigram_ids, 5)], impl)
    table, bigram = (torch.randn(rows, 8, requires_grad=True) for rows in (4, 5))
    angles, qkv = rope_table(30, 4, 100.0), torch.randn(2, 30, 32)
    found = []
    for given, other in ((None, None), (order, None), (None, of_bigrams), (order, of_bigrams)):
        v = qk_rope(
            qkv, *angles, torch.ones(2), 2, 1, value=table, value_ids=ids, value_order=given,
            impl=impl,
        )[2]  # fmt: skip
        x = embed_smear(
            ids, table, bigram, bigram_ids=bigram_ids, order=given, bigram_order=other, impl=impl
        )
        out = v.square().sum() + x[..., 0].sum()
        found.append(torch.autograd.grad(out, (table, bigram)))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    strided = tuple(torch.stack((t, t), 1)[:, 0] for t in order)
    with pytest.raises(ValueError, match="order has to be contiguous"):
        embed_smear(ids, table, order=strided, impl=impl)
    for wrong in ((order[0] + 30, order[1]), (order[0], order[1] * 2), (order[0], -order[1])):
        with pytest.raises(ValueError, match="order is no order of 60 tokens"):
            embed_smear(ids, table, order=wrong, impl=impl)


@every_kernel
def test_no_sums_are_made_for_nobody(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(qk_rope_kernels, "token_sums", lambda *a: asked.append(a))
    ids, table = drawn(2, 9, 4), torch.randn(4, 8)
    qkv = torch.randn(2, 9, 32, requires_grad=True)
    angles = rope_table(9, 4, 100.0)
    v = qk_rope(qkv, *angles, torch.ones(2), 2, 1, value=table, value_ids=ids, impl=impl)[2]
    v.sum().backward()
    assert not asked and qkv.grad is not None


def refused() -> dict:
    """Message -> the call that has to fail with it."""
    ids, qkv, table = drawn(2, 3, 4), torch.randn(2, 3, 4 * 8), torch.randn(4, 8)
    angles, gain = rope_table(3, 4, 100.0), torch.ones(2)

    def rope(impl: str, value: Tensor | None, value_ids: Tensor) -> None:
        qk_rope(qkv, *angles, gain, 2, 1, value=value, value_ids=value_ids, impl=impl)

    def smear(impl: str, bigram: Tensor | None, bigram_ids: Tensor) -> None:
        embed_smear(ids, torch.randn(5, 8), bigram, bigram_ids=bigram_ids, impl=impl)

    return {
        "value_ids is torch.int32 (2, 3): it has": lambda i: rope(i, table, ids.int()),
        "value_ids is torch.int64 (2, 2): it has": lambda i: rope(i, table, ids[:, 1:]),
        "value is None: with value_ids it has": lambda i: rope(i, None, ids),
        "value is (4, 7): with value_ids it has to be a table (V, 8), V >= 1": lambda i: rope(
            i, table[:, 1:], ids
        ),
        "value_order is given without value_ids": lambda i: qk_rope(
            qkv, *angles, gain, 2, 1, impl=i, value_order=(ids.flatten(), ids.flatten()[:5])
        ),
        "value_order is [(torch.int64, (6,)), (torch.int64, (4,))]: for": lambda i: qk_rope(
            qkv, *angles, gain, 2, 1, value=table, value_ids=ids, impl=i,
            value_order=(ids.flatten(), ids.flatten()[:4]),
        ),
        "order is [(torch.int64, (5,)), (torch.int64, (6,))]: for": lambda i: embed_smear(
            ids, torch.randn(5, 8), impl=i, order=(ids.flatten()[:5], ids.flatten())
        ),
        "order is [(torch.int64, (6,)), (torch.int64, (6,))]: for": lambda i: embed_smear(
            ids, torch.randn(5, 8), impl=i, order=(ids.flatten(), ids.flatten())
        ),
        "bigram_order is [(torch.int32, (6,)), (torch.int32, (4,))]: for": lambda i: embed_smear(
            ids, torch.randn(5, 8), table, bigram_ids=ids, impl=i,
            bigram_order=(ids.flatten().int(), ids.flatten()[:4].int()),
        ),
        "bigram_order is given without bigram_ids: give both": lambda i: embed_smear(
            ids, torch.randn(5, 8), impl=i, bigram_order=(ids.flatten(), ids.flatten())
        ),
        "bigram_ids is torch.int32 (2, 3): it has": lambda i: smear(i, table, ids.int()),
        "bigram is None: with bigram_ids it has": lambda i: smear(i, None, ids),
        "bigram is (2, 3, 8): with bigram_ids it has": lambda i: smear(
            i, torch.randn(2, 3, 8), ids
        ),
        "bigram is torch.float32 (4, 7): it has": lambda i: smear(i, table[:, 1:], ids),
    }


@pytest.mark.parametrize("message", refused())
def test_refused(message: str) -> None:
    for impl in ("reference", *KERNELS):
        with pytest.raises(ValueError) as caught:
            refused()[message](impl)
        assert message in str(caught.value)
