"""Token embedding with hashed bigrams, its norm, and SmearGate.

    x_t = (1 - g) n_t + g n_{t-1},  g = sigmoid(gate),  n_{-1} = 0         (SmearGate, plain form)
    n = e rstd,   rstd = 1 / sqrt(mean(e^2) + eps),   e = table[id] + scale * bigram
    bigram row of position t = ((36313 id[t]) xor (27191 id[t-1])) mod (B - 1);  B - 1 at t = 0

Both come from the contest's public records; the hash constants are theirs. With d = dx and
u_t = d_{t+1} where t + 1 sees t, else 0, the gradients are

    dn = (1 - g) d + g u,   de = rstd (dn - n mean(dn n)),   dbigram = scale de
    dtable[i] = sum of de over the tokens i,   d_scale = sum of de . bigram,
    d_gate = g (1 - g) sum of n (u - d)

Bigrams may come as rows of a table, which kernels look up.

Shapes: ids (N, T) int64, table (V, D), x and bigram (N, T, D), gate (D,); with bigram_ids (N, T)
bigram is a table (B, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import beyond, resolve
from pgolf.ops.embed_smear_kernels import forward, launchers
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import DTYPE_CODES, in_extension
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.residual_norm import rms_norm
from pgolf.ops.tensors import compute_dtype, nbytes
from pgolf.ops.token_sums import check_order

WIDTH_LIMITS = {"cpu": 768, "cuda": 768}  # of a row
_INPUTS = Inputs(
    "embed_smear",
    ("ids", "table", "bigram", "bigram_scale", "gate", "starts", "bigram_ids"),
    alike=("bigram",), wide=("bigram_scale", "gate"),
    optional=("bigram", "bigram_scale", "gate", "starts", "bigram_ids"),
)  # fmt: skip


def bigram_rows(ids: Tensor, buckets: int) -> Tensor:
    """Row of the bigram table for each position: (N, T), in [0, buckets)."""
    hashed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (buckets - 1)
    return F.pad(hashed, (1, 0), value=buckets - 1)


def smear(x: Tensor, gate: Tensor, starts: Tensor | None = None) -> Tensor:
    """Blend each position with the one before it.

    Args:
        starts: (N, T) bool, positions that begin a document: they see zeros instead of the
            position before, as position 0 does. None is the plain form.
    """
    g = torch.sigmoid(gate).to(x.dtype)
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    if starts is not None:
        previous = previous.masked_fill(starts[..., None], 0)
    return (1 - g) * x + g * previous


@outside_autocast
def reference(
    ids: Tensor,
    table: Tensor,
    bigram: Tensor | None = None,
    bigram_scale: Tensor | None = None,
    gate: Tensor | None = None,
    starts: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    bigram_ids: Tensor | None = None,
) -> Tensor:
    """`embed_smear` in plain torch."""
    if bigram_ids is not None:  # (the gradient of a row is a sum over tokens, so it is fp32)
        bigram = F.embedding(bigram_ids, bigram.to(compute_dtype(dtype))).to(dtype)
    x = F.embedding(ids, table).to(dtype)
    if bigram is not None:
        x = x + (bigram if bigram_scale is None else bigram * bigram_scale.to(dtype))
    x = rms_norm(x, eps, "reference")
    return x if gate is None else smear(x, gate, starts)


def _check(
    ids: Tensor, table: Tensor, bigram: Tensor | None, bigram_scale: Tensor | None,
    gate: Tensor | None, starts: Tensor | None, eps: float, dtype: torch.dtype,
    bigram_ids: Tensor | None,
) -> None:  # fmt: skip
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"embed_smear: ids is {ids.dtype} {tuple(ids.shape)}: it has to be int64 (N, T)"
        )
    if table.dim() != 2 or not table.is_floating_point() or not table.size(1):
        raise ValueError(
            f"embed_smear: table is {table.dtype} {tuple(table.shape)}: it has to be (V, D) of a "
            "float dtype"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"embed_smear: dtype={dtype}: it has to be a float dtype")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"embed_smear: eps={eps}: it has to be 0 or more, and finite")
    width, wide = table.size(1), compute_dtype(dtype)
    of_bigram = ids.shape
    if bigram_ids is not None:
        if bigram is None or bigram.dim() != 2:
            shape = None if bigram is None else tuple(bigram.shape)
            raise ValueError(
                f"embed_smear: bigram is {shape}: with bigram_ids it has to be a table (B, {width})"
            )
        of_bigram = bigram.shape[:1]
    for name, t, shape, expected in (
        ("bigram", bigram, (*of_bigram, width), dtype),
        ("bigram_ids", bigram_ids, ids.shape, torch.int64),
        ("bigram_scale", bigram_scale, (), wide),
        ("gate", gate, (width,), wide),
        ("starts", starts, ids.shape, torch.bool),
    ):
        if t is not None and (t.shape != torch.Size(shape) or t.dtype != expected):
            raise ValueError(
                f"embed_smear: {name} is {t.dtype} {tuple(t.shape)}: it has to be {expected} "
                f"{tuple(shape)}"
            )
        if t is not None and t.device != table.device:
            raise ValueError(
                f"embed_smear: {name} is on {t.device} and table on {table.device}: move one"
            )
    if ids.device != table.device:
        raise ValueError(
            f"embed_smear: ids is on {ids.device} and table on {table.device}: move one"
        )


def obstacle(impl: str, width: int, table: torch.dtype, dtype: torch.dtype) -> str:
    """Why `impl` cannot make x in `dtype` from rows of a table; '' if it can."""
    if dtype not in DTYPE_CODES or (dtype == torch.float64) != (table == torch.float64):
        return f"a table in {table} for x in {dtype}: it takes fp32 and bf16, or fp64 for both"
    return beyond(WIDTH_LIMITS, impl, width, "elements a row")


def embed_smear(
    ids: Tensor,
    table: Tensor,
    bigram: Tensor | None = None,
    bigram_scale: Tensor | None = None,
    gate: Tensor | None = None,
    starts: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    *,
    bigram_ids: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    bigram_order: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Embed tokens, add their bigrams, norm, and blend each position with the one before it.

    The gradient of the table is deterministic: tokens are sorted by id, and the order of every sum
    is fixed. On a GPU its whole backward is three launches, and one more with bigrams by id; above
    32,768 rows torch sorts, in many.

    Args:
        ids: (N, T) int64. One that the table does not have is an error on a CPU; on a GPU, where
            nobody looks, its row of x is NaN, and so is the row of another table's gradient that
            this one goes to.
        table: (V, D), in fp32 or bf16 for the kernels whatever dtype is (fp64 with an fp64 dtype).
        bigram: (N, T, D) of `dtype`; with `bigram_ids` a table (B, D), with such a gradient too.
        bigram_scale: () factor of bigram in fp32 (fp64 for an fp64 dtype); None is 1.
        gate: (D,) in fp32 (fp64 for an fp64 dtype); None: no smearing.
        starts: (N, T) bool, positions that see zeros instead of the one before; None: only t = 0.
        eps: added to the mean square of a row before the root.
        dtype: of x.
        impl: 'auto', 'reference', 'cpu' (C++; fp32, bf16, fp64; D <= 768) or 'cuda' (fp32, bf16;
            D <= 768).
        bigram_ids: (N, T) int64, the row of `bigram` for each token; what is said of `ids` holds.
        order, bigram_order: what `token_sums.shared_orders` gives for ids and bigram_ids, if others
            need it too, or for both in one launch.

    Returns:
        x (N, T, D), contiguous.

    Raises:
        ValueError, RuntimeError: as `xsa`; IndexError by torch, from the reference, for ids.
    """
    ids, table, bigram, bigram_scale, gate, starts, bigram_ids = _INPUTS(
        ids, table, bigram, bigram_scale, gate, starts, bigram_ids, dtype=dtype
    )
    _check(ids, table, bigram, bigram_scale, gate, starts, eps, dtype, bigram_ids)
    if order is not None:
        check_order("embed_smear", "order", order, ids, table.size(0))
    if bigram_order is not None:
        if bigram_ids is None:
            raise ValueError("embed_smear: bigram_order is given without bigram_ids: give both")
        check_order("embed_smear", "bigram_order", bigram_order, bigram_ids, bigram.size(0))
    impl = resolve("embed_smear", impl, table, width=table.size(1), table=table.dtype, dtype=dtype)
    if impl == "reference":
        return reference(ids, table, bigram, bigram_scale, gate, starts, eps, dtype, bigram_ids)
    tensors = (ids, table, bigram, bigram_scale, gate, starts, bigram_ids)
    orders = (*(order or (None, None)), *(bigram_order or (None, None)))
    return forward(*tensors, *orders, eps, dtype, impl)[0]


def samples() -> list[Sample]:
    """With and without bigrams and gate; one id for all tokens, and all others never seen."""

    def make(
        batch: int, time: int, rows: int, width: int, bigrams: bool = True, gated: bool = True,
        starts: bool = False, same: bool = False, table_dtype: torch.dtype | None = None,
        scaled: bool = True, bigram_rows: int = 0,
    ):  # fmt: skip
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(time)
            wide = compute_dtype(dtype)
            table = torch.randn(rows, width, generator=g).double()
            of_bigram = (bigram_rows,) if bigram_rows else (batch, time)
            bigram = torch.randn(*of_bigram, width, generator=g).double()
            ids = torch.randint(rows, (batch, time), generator=g)
            ids = torch.full_like(ids, rows // 2) if same else ids
            own = dtype if table_dtype is None or dtype == torch.float64 else table_dtype
            named = {"dtype": dtype}
            if bigrams:
                named["bigram"] = bigram.to(device, dtype)
            if bigrams and scaled:
                named["bigram_scale"] = torch.tensor(0.3).to(device, wide)
            if gated:
                named["gate"] = torch.linspace(-2, 1, width).to(device, wide)
            if starts:
                named["starts"] = (torch.rand(batch, time, generator=g) < 0.3).to(device)
            if bigram_rows:
                bigram_ids = torch.randint(bigram_rows, (batch, time), generator=g)
                named["bigram_ids"] = bigram_ids.to(device)
            return (ids.to(device), table.to(device, own)), named

        return build

    shapes = {
        "2x70 of 5x64": make(2, 70, 5, 64, starts=True),
        "1x40 of 9x516 fp32 table": make(1, 40, 9, 516, table_dtype=torch.float32),
        "3x50 of 4x33, one id": make(3, 50, 4, 33, same=True, scaled=False),
        "2x9 of 40x48 alone": make(2, 9, 40, 48, bigrams=False, gated=False),
        "2x70 of 5x64, bigrams of 11": make(2, 70, 5, 64, bigram_rows=11),
        "1x9 of 4x33, bigrams of 90": make(1, 9, 4, 33, bigram_rows=90, scaled=False),
        "0 tokens": make(1, 0, 3, 16),
    }
    big = {f"{t} tokens": make(t // 2048, 2048, 1024, 512) for t in (8192, 98304)}
    return [Sample(label, build) for label, build in shapes.items()] + [
        Sample(label, build, bench=True) for label, build in big.items()
    ]


def cost(
    ids: Tensor, table: Tensor, bigram: Tensor | None = None, bigram_scale: Tensor | None = None,
    gate: Tensor | None = None, starts: Tensor | None = None, eps: float = 1e-6,
    dtype: torch.dtype = torch.float32, bigram_ids: Tensor | None = None,
) -> tuple[Work, Work]:  # fmt: skip
    """Least work: every tensor once, of the table no more rows than tokens, and rstd is kept."""
    x_bytes = ids.numel() * table.size(1) * dtype.itemsize
    rstd = ids.numel() * compute_dtype(dtype).itemsize
    rows = min(nbytes(table), ids.numel() * table.size(1) * table.element_size())
    read = nbytes(ids, bigram, bigram_scale, gate, starts, bigram_ids) + rows
    return (
        Work(0, read, x_bytes + rstd),
        Work(0, read + x_bytes + rstd, nbytes(table, bigram, bigram_scale, gate)),
    )


_FUNCTIONS = ("embed_smear", "embed_smear_backward", "token_order", "token_sums")
OPERATOR = register(
    Operator(
        name="embed_smear",
        call=embed_smear,
        reference=reference,
        differentiable=("table", "bigram", "bigram_scale", "gate"),
        implementations=in_extension(_FUNCTIONS, launchers),
        preferred={
            "cpu": [("cpu", "C++, faster than eager and compiled (python -m bench ops)")],
            "cuda": [("cuda", "every number once forward; the table's gradient is deterministic")],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
    )
)
