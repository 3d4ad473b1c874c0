"""Bigram hash and SmearGate against values worked out by hand."""

import pytest
import torch

from pgolf.ops.embed_smear import bigram_rows, cost, embed_smear, smear
from pgolf.ops.operator import OPERATORS
from pgolf.ops.tensors import nbytes

from .cases import implementations
from .guards import GuardZones


def test_bigram_rows_by_hand() -> None:
    # (36313 * 5) xor (27191 * 3) = 181565 xor 81573 = 261016;  261016 mod 9 = 7
    # (36313 * 0) xor (27191 * 5) = 0 xor 135955 = 135955;      135955 mod 9 = 1
    assert bigram_rows(torch.tensor([[3, 5, 0]]), 10).tolist() == [[9, 7, 1]]


@pytest.mark.parametrize("buckets", [2, 3, 2048, 3072, 10240])
def test_bigram_rows_in_python_integers(buckets: int) -> None:
    ids = torch.randint(65536, (3, 50), generator=torch.Generator().manual_seed(buckets))
    ids[0, :4] = torch.tensor([0, 65535, 65535, 0])
    rows = bigram_rows(ids, buckets)
    assert rows.dtype is torch.int64
    for row, found in zip(ids.tolist(), rows.tolist(), strict=True):
        expected = [buckets - 1] + [
            ((36313 * b) ^ (27191 * a)) % (buckets - 1) for a, b in zip(row, row[1:], strict=False)
        ]
        assert found == expected


def test_the_last_row_is_for_position_0_alone() -> None:
    ids = torch.arange(1024).repeat(2, 1)
    rows = bigram_rows(ids, 64)
    assert (rows[:, 0] == 63).all()
    assert rows[:, 1:].max() < 63 and rows.min() >= 0


def test_order_of_the_pair_matters() -> None:
    assert (
        bigram_rows(torch.tensor([[3, 5]]), 2048)[0, 1]
        != (bigram_rows(torch.tensor([[5, 3]]), 2048)[0, 1])
    )


def test_a_single_position() -> None:
    assert bigram_rows(torch.tensor([[7]]), 16).tolist() == [[15]]
    x = torch.randn(1, 1, 4)
    torch.testing.assert_close(smear(x, torch.zeros(4)), x / 2)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    return x, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)


def by_hand(x: torch.Tensor, gate: torch.Tensor, starts: set[tuple[int, int]]) -> torch.Tensor:
    g = 1 / (1 + (-gate).exp())
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            alone = t == 0 or (n, t) in starts
            out[n, t] = (1 - g) * x[n, t] + (0 if alone else g * x[n, t - 1])
    return out


def test_smear() -> None:
    x, gate = sample()
    torch.testing.assert_close(smear(x, gate), by_hand(x, gate, set()))
    starts = torch.zeros(2, 4, dtype=torch.bool)
    torch.testing.assert_close(smear(x, gate, starts), by_hand(x, gate, set()))
    starts[0, 0] = starts[0, 2] = starts[1, 3] = True
    torch.testing.assert_close(smear(x, gate, starts), by_hand(x, gate, {(0, 2), (1, 3)}))


def test_smear_of_a_fresh_gate_is_the_mean_of_two() -> None:
    x, _ = sample()
    out = smear(x, torch.zeros(3))
    torch.testing.assert_close(out[:, 1:], (x[:, 1:] + x[:, :-1]) / 2)


def test_smear_keeps_the_dtype_and_reads_strided_inputs() -> None:
    x, gate = sample()
    assert smear(x.bfloat16(), gate.float()).dtype is torch.bfloat16
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(smear(strided, gate), smear(x, gate))


def test_gradient() -> None:
    x, gate = sample()
    starts = torch.tensor([[False, False, True, False]] * 2)
    leaves = (x.requires_grad_(), gate.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, g: smear(x, g, starts), leaves)


# --- embed_smear ----------------------------------------------------------------------------------

KERNELS = implementations(OPERATORS["embed_smear"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def embed_by_hand(ids, table, bigram, scale, gate, starts, eps) -> torch.Tensor:
    """The formula position by position, in float64."""
    out = torch.zeros(*ids.shape, table.size(1), dtype=torch.float64)
    g = 1 / (1 + torch.exp(-gate.double()))
    for n, row in enumerate(ids.tolist()):
        before = torch.zeros(table.size(1), dtype=torch.float64)
        for t, token in enumerate(row):
            e = table[token].double() + scale.double() * bigram[n, t].double()
            normed = e / (e.square().mean() + eps).sqrt()
            seen = before if t and not starts[n, t] else torch.zeros_like(before)
            out[n, t] = (1 - g) * normed + g * seen
            before = normed
    return out


def tensors(ids: torch.Tensor, rows: int, width: int, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of embed_smear; a third of the positions start documents."""
    g = torch.Generator().manual_seed(rows + width)
    return {
        "ids": ids,
        "table": torch.randn(rows, width, generator=g).to(dtype),
        "bigram": torch.randn(*ids.shape, width, generator=g).to(dtype),
        "bigram_scale": torch.tensor(0.4),
        "gate": torch.randn(width, generator=g),
        "starts": torch.rand(ids.shape, generator=g) < 0.3,
        "dtype": dtype,
    }


def some_ids(*shape: int, rows: int) -> torch.Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(1))


def run(impl: str, arguments: dict, upstream: torch.Tensor | None = None) -> list:
    """x, then the gradients of table, bigram, scale and gate, as far as they are there."""
    named = dict(arguments)
    wanted = [n for n in ("table", "bigram", "bigram_scale", "gate") if named.get(n) is not None]
    leaves = [named[n].detach().requires_grad_() for n in wanted]
    x = embed_smear(**named | dict(zip(wanted, leaves, strict=True)), impl=impl)
    if upstream is None:
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    return [x.detach(), *torch.autograd.grad(x, leaves, upstream)]


def agree(impl: str, arguments: dict, upstream: torch.Tensor | None = None) -> None:
    mine, theirs = (run(i, arguments, upstream) for i in (impl, "reference"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
def test_embed_smear_by_hand(impl: str) -> None:
    named = tensors(some_ids(2, 6, rows=4), 4, 8)
    dtype = named.pop("dtype")
    expected = embed_by_hand(*named.values(), 0.01)
    x = embed_smear(**named, eps=0.01, dtype=dtype, impl=impl)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)


@every_kernel
@pytest.mark.parametrize("width", [1, 33, 64, 520, 768])
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (3, 1), (1, 32), (1, 33), (2, 130)])
def test_shapes(impl: str, width: int, batch: int, time: int) -> None:
    """A token, a chunk, one more than a chunk, more than a block; widths without vectors."""
    agree(impl, tensors(some_ids(batch, time, rows=7), 7, width))


@every_kernel
@pytest.mark.parametrize(
    "ids",
    [
        [3] * 200,  # one piece through all chunks
        [*[0] * 32, *[1] * 32, *[2] * 64],  # pieces that end with their chunks
        [*[0] * 31, *[1] * 2, *[2] * 30, *[4] * 2],  # and that just do not
        [*range(5)] * 8,  # whole pieces amid a chunk
        [4],
    ],
)
def test_pieces_of_the_tables_gradient(impl: str, ids: list) -> None:
    """Pieces of all kinds, in an order that sorting has to restore; some rows are never seen."""
    shuffled = torch.tensor(ids)[torch.randperm(len(ids), generator=torch.Generator())]
    named = tensors(shuffled[None], 5, 24)
    agree(impl, named)
    unseen = [row for row in range(5) if row not in ids]
    assert not run(impl, named)[1][unseen].any()


@every_kernel
@pytest.mark.parametrize("without", [("gate", "starts"), ("starts",), ("bigram", "bigram_scale"),
                                     ("bigram_scale",), ("gate", "bigram", "bigram_scale")])
def test_parts_that_are_missing(impl: str, without: tuple) -> None:
    named = tensors(some_ids(2, 40, rows=6), 6, 16)
    agree(impl, {n: t for n, t in named.items() if n not in without})


@every_kernel
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_table_and_x_may_differ(impl: str, table: torch.dtype, dtype: torch.dtype) -> None:
    named = tensors(some_ids(2, 40, rows=6), 6, 48, dtype)
    named["table"] = named["table"].to(table)
    exact = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in named.items()
    }
    upstream = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    mine = run(impl, named, upstream)
    truth = run("reference", exact | {"dtype": torch.float64}, upstream.double())
    assert [t.dtype for t in mine] == [dtype, table, dtype, torch.float32, torch.float32]
    for got, ideal in zip(mine, truth, strict=True):
        error = (got.double() - ideal).abs().max()
        assert error <= 20 * torch.finfo(got.dtype).eps * ideal.abs().max()  # terms cancel


@every_kernel
def test_strided_arguments_and_any_address(impl: str) -> None:
    named = tensors(some_ids(3, 20, rows=6), 6, 32)
    upstream = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(3))
    plain = run(impl, named, upstream)

    def moved(t: torch.Tensor, off: int) -> torch.Tensor:
        return torch.cat([t.new_zeros(off), t.flatten()])[off:].view(t.shape)

    off = {n: moved(t, 1) if isinstance(t, torch.Tensor) else t for n, t in named.items()}
    assert off["table"].data_ptr() % 16
    strided = named | {
        "ids": named["ids"].mT.contiguous().mT,
        "table": torch.cat([named["table"]] * 2, 1)[:, :32],
        "bigram": named["bigram"].mT.contiguous().mT,
        "starts": named["starts"].mT.contiguous().mT,
    }
    for other, dx in ((off, moved(upstream, 1)), (strided, upstream.mT.contiguous().mT)):
        for a, b in zip(run(impl, other, dx), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("width", [64, 33])
def test_nothing_is_written_outside(impl: str, width: int) -> None:
    named = tensors(some_ids(2, 70, rows=9), 9, width)
    with GuardZones(scratch=True):
        run(impl, named)


@every_kernel
def test_a_nan_reaches_its_own_row_and_the_next(impl: str) -> None:
    ids = torch.tensor([[0, 1, 2, 0, 3, 0]])
    named = tensors(ids, 5, 8)
    named["starts"] = torch.zeros_like(ids, dtype=torch.bool)
    named["table"][2, 5] = float("nan")
    x, dtable, dbigram, d_scale, d_gate = run(impl, named)
    assert x.isnan().any(-1).tolist() == [[False, False, True, True, False, False]]
    assert dtable.isnan().any(-1).tolist() == [False, False, True, False, False]
    assert dbigram.isnan().any(-1).tolist() == [[False, False, True, False, False, False]]
    assert d_scale.isnan() and d_gate.isnan().all()


@pytest.mark.parametrize("id_", [-1, 6])
def test_ids_that_are_not_in_the_table(id_: int) -> None:
    """One error on a CPU; the CUDA kernel has NaN in the row and leaves the table alone."""
    ids = some_ids(2, 5, rows=6)
    ids[1, 2] = id_
    named = tensors(ids, 6, 8)
    if "cpu" in KERNELS:
        with pytest.raises(ValueError, match=rf"ids\[7\] is {id_}: the table has 6 rows"):
            run("cpu", named)
    with pytest.raises(IndexError):
        run("reference", named)
    if "cuda" in KERNELS:
        x, dtable, *_ = run("cuda", named)
        assert x[1, 2].isnan().all() and x.isnan().any(-1).sum() <= 2
        assert not dtable.isnan().any()


@pytest.mark.skipif("cpu" not in KERNELS, reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    named = tensors(some_ids(3, 2000, rows=50).clamp(max=40), 50, 64, dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(run("cpu", named))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_of_threads_gives_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tensors(some_ids(2, 150, rows=6).clamp(max=4), 6, 64, dtype)
    runs = []
    for seed in range(3):
        monkeypatch.setenv("PGOLF_EMULATOR_SEED", str(seed))
        runs.append(run("cuda", named))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def refused() -> dict:
    """Message -> the arguments that have to fail with it."""
    named = tensors(some_ids(2, 5, rows=6), 6, 8)
    return {
        "ids is torch.int64 (5,): it has to be int64 (N, T)": named | {"ids": named["ids"][0]},
        "ids is torch.int32": named | {"ids": named["ids"].int()},
        "table is torch.float32 (6, 0)": named | {"table": named["table"][:, :0]},
        "table is torch.int64": named | {"table": named["table"].long()},
        "dtype=torch.int32": named | {"dtype": torch.int32},
        "eps=inf": named | {"eps": float("inf")},
        "bigram is torch.float32 (2, 5, 7)": named | {"bigram": named["bigram"][..., :7]},
        "bigram is torch.bfloat16": named | {"bigram": named["bigram"].bfloat16()},
        "bigram_scale is torch.float32 (1,)": named | {"bigram_scale": torch.ones(1)},
        "gate is torch.float64 (8,): it has to be torch.float32 (8,)": named
        | {"gate": named["gate"].double()},
        "starts is torch.int64": named | {"starts": named["ids"]},
        "gate is on meta and table on cpu": named | {"gate": named["gate"].to("meta")},
        "ids is on meta and table on cpu": named | {"ids": named["ids"].to("meta")},
    }


@pytest.mark.parametrize("message", refused())
def test_refused(message: str) -> None:
    for impl in ("reference", *KERNELS):
        with pytest.raises(ValueError) as caught:
            embed_smear(**refused()[message], impl=impl)
        assert message in str(caught.value) and str(caught.value).startswith("embed_smear: ")


@pytest.mark.parametrize(
    ("width", "table", "dtype", "why"),
    [
        (776, torch.float32, torch.float32, "it takes at most 768 elements a row, not 776"),
        (8, torch.float64, torch.float32, "a table in torch.float64 for x in torch.float32"),
    ],
)
def test_what_kernels_do_not_take(
    width: int, table: torch.dtype, dtype: torch.dtype, why: str
) -> None:
    """An error by name, the reference where nobody asked for the kernel."""
    named = tensors(some_ids(2, 3, rows=4), 4, width, dtype)
    named["table"] = named["table"].to(table)
    with pytest.raises(ValueError, match=f"embed_smear: impl=cpu: {why}"):
        embed_smear(**named, impl="cpu")
    expected = embed_smear(**named, impl="reference")
    torch.testing.assert_close(embed_smear(**named), expected)


def test_cost_is_every_tensor_once() -> None:
    named = tensors(some_ids(2, 5, rows=6), 6, 8)
    inputs = {n: t for n, t in named.items() if isinstance(t, torch.Tensor)}
    x, rstd = 2 * 5 * 8 * 4, 2 * 5 * 4
    forward, backward = cost(**named)
    assert forward == (0, nbytes(*inputs.values()), x + rstd)
    wanted = nbytes(*(inputs[n] for n in ("table", "bigram", "bigram_scale", "gate")))
    assert backward == (0, nbytes(*inputs.values()) + x + rstd, wanted)
    large = cost(named["ids"], torch.empty(1000, 8))[0]
    assert large.read == nbytes(named["ids"]) + 2 * 5 * 8 * 4, "no more rows than tokens"
