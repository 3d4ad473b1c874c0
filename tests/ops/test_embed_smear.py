"""Bigram hash and SmearGate against values worked out by hand."""

import pytest
import torch

from pgolf.ops.embed_smear import bigram_rows, smear


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
