"""Tokens sorted by id: by the kernels themselves, and as operators share the orders."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pgolf.ops import token_sums
from pgolf.ops.launch import run_cpp, run_cuda
from pgolf.ops.operator import OPERATORS
from pgolf.ops.token_sums import shared_orders, token_orders

from .cases import implementations
from .test_row_kernel_arguments import callers, refusal

RUNS = {"cpu": run_cpp, "cuda": run_cuda}
KERNELS = implementations(OPERATORS["embed_smear"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)
LISTS = {"ids": 2, "orders": 2, "bounds": 4}  # elements of each address in good arguments


def arguments() -> tuple[dict, list[Tensor]]:
    """Of two lists, and the memory behind their pointers."""
    memory = [torch.zeros(8).long() for _ in range(6)]
    pointers = iter(t.data_ptr() for t in memory)
    lists = {name: [next(pointers), next(pointers)] for name in LISTS}
    return {**lists, "counts": [2, 2], "vocabs": [3, 3]}, memory


def sort_tokens(call, lists: Sequence[tuple[list[int], int]]) -> list[tuple[list, list]]:
    """The order and the bounds for each of (ids, rows)."""
    ids = [torch.tensor(some).long() for some, _ in lists]
    orders = [torch.empty(len(some)).int() for some, _ in lists]
    bounds = [torch.empty(rows + 1).int() for _, rows in lists]
    tensors = {"ids": ids, "orders": orders, "bounds": bounds}
    call(
        **{name: [t.data_ptr() for t in given] for name, given in tensors.items()},
        counts=[len(some) for some, _ in lists], vocabs=[rows for _, rows in lists],
    )  # fmt: skip
    return [(o.tolist(), b.tolist()) for o, b in zip(orders, bounds, strict=True)]


def sorted_tokens(ids: list[int], rows: int) -> tuple[list[int], list[int]]:
    order = sorted(range(len(ids)), key=lambda token: ids[token])
    return order, [sum(i < row for i in ids) for row in range(rows + 1)]


@pytest.mark.parametrize("ids", [[3, 0, 3, 1, 0, 3], [], [4] * 3000, [*range(299, -1, -1)] * 9])
@pytest.mark.parametrize("rows", [5, 127, 128, 300])
def test_token_order(ids: list[int], rows: int) -> None:
    """Stable, and where each id begins: at the ends, all alike, none, several a block."""
    ids = [rows - 1 - (i % rows) for i in ids]
    for call in callers("token_order"):
        assert sort_tokens(call, [(ids, rows)]) == [sorted_tokens(ids, rows)]


@pytest.mark.parametrize("count", [0, 2, 4, 5, 9])
def test_lists_of_any_number_and_size(count: int) -> None:
    """More than a launch takes, of no tokens, of no rows, and of as many rows as there may be."""
    sizes = [(40, 7), (3, 300), (0, 5), (1100, 1), (0, 0), (9, 128), (1, 1), (70, 40), (5, 32768)]
    g = torch.Generator().manual_seed(count)
    lists = [
        (torch.randint(max(rows, 1), (tokens,), generator=g).tolist(), rows)
        for tokens, rows in sizes[:count]
    ]
    for call in callers("token_order"):
        assert sort_tokens(call, lists) == [sorted_tokens(*one) for one in lists]


def test_tokens_that_are_in_no_order() -> None:
    """An error on a CPU; on a GPU they come last, and the bounds leave them out."""
    ids = [3, -1, 0, 2**40, 3, 5, 1]
    on_cpu, *on_gpu = callers("token_order")
    with pytest.raises(ValueError, match=r"ids\[1\] is -1: the table has 4 rows"):
        sort_tokens(on_cpu, [([0], 1), (ids, 4)])
    for call in on_gpu:
        (found,) = sort_tokens(call, [(ids, 4)])
        assert found == ([2, 6, 0, 4, 1, 3, 5], [0, 1, 2, 2, 4])


def test_arguments_that_are_refused() -> None:
    given, _memory = arguments()
    on_cpu, *on_gpu = callers("token_order")
    for call in (on_cpu, *on_gpu):
        call(**given)
        for name, elements in LISTS.items():
            null = given | {name: [given[name][0], 0]}
            message = refusal(call, null)
            assert message == f"{name} is a null pointer: it has to hold {elements} elements"
        for name in ("counts", "vocabs", "orders", "bounds"):
            message = refusal(call, given | {name: given[name][:1]})
            assert message == f"the length of {name} is 1: it has to be 2"
        for name in ("counts", "vocabs"):
            message = refusal(call, given | {name: [2, -1]})
            assert message == f"{name} is -1: a size is not negative"
        message = refusal(call, given | {"counts": [2, 2**31]})
        assert message == "counts is 2147483648: it may be at most 2147483647"
    for call in on_gpu:
        message = refusal(call, given | {"vocabs": [3, 32769]})
        assert message == "vocabs is 32769: it may be at most 32768"


def drawn(rows: int, seed: int) -> Tensor:
    return torch.randint(rows, (2, 30), generator=torch.Generator().manual_seed(seed))


@every_kernel
def test_orders_of_several_tables_are_made_in_one_call(impl: str) -> None:
    calls = []

    def run(name, *args):
        calls.append(name)
        RUNS[impl](name, *args)

    tables = [(drawn(4, 0), 4), (drawn(9, 1), 9), (drawn(2, 2), 3)]
    alone = [token_orders(RUNS[impl], [table])[0] for table in tables]
    known = [None, alone[1], None]
    found = token_sums.with_missing(run, tables, known)
    assert calls == ["token_order"] and found[1] is alone[1]
    assert token_sums.with_missing(run, tables, alone) == alone and len(calls) == 1
    for orders in (found, shared_orders(tables, impl)):
        for order, other in zip(orders, alone, strict=True):
            assert all(map(torch.equal, order, other))
            assert {t.dtype for t in order} == {torch.int32}


@every_kernel
def test_tokens_that_have_no_numbers(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sums, "_MOST_TOKENS", 59)
    with pytest.raises(ValueError, match="token_order: 60 tokens: it takes 59 at most"):
        shared_orders([(drawn(4, 0), 4)], impl)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="token_order: ids is torch.int32"):
        shared_orders([(drawn(4, 0), 4), (drawn(4, 0).int(), 4)], impl)


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA kernels")
def test_a_table_too_large_for_the_counting_sort_is_sorted_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same order and bounds; with the counting sort torch sorts nothing."""
    tables = [(drawn(9, 0), 9), (drawn(5, 1), 5), (drawn(9, 2), 12)]
    sort, sorts = torch.sort, []
    monkeypatch.setattr(torch, "sort", lambda *a, **k: sorts.append(a) or sort(*a, **k))
    counted = token_orders(run_cuda, tables)
    assert not sorts
    monkeypatch.setitem(token_sums.ORDER_LIMITS, "cuda", 8)
    found = token_orders(run_cuda, tables)
    assert len(sorts) == 2
    for order, other in zip(counted, found, strict=True):
        assert all(map(torch.equal, order, other))
        assert {t.dtype for t in other} == {torch.int32}
