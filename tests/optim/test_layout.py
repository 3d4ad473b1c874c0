"""Who owns what: every element once, units whole, nobody with much more to do than others."""

from hypothesis import given
from hypothesis import strategies as st

from pgolf.optim.layout import ALIGNED, Layout, newton_schulz_cost

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
units = st.lists(st.lists(shapes, min_size=1, max_size=3), min_size=1, max_size=20)


def named(drawn: list[list[tuple[int, int]]]) -> list[dict[str, tuple[int, int]]]:
    return [{f"{i}.{j}": shape for j, shape in enumerate(unit)} for i, unit in enumerate(drawn)]


@given(units, st.integers(1, 17))
def test_every_matrix_lies_whole_in_its_owners_part(drawn, world: int) -> None:
    layout = Layout.of(named(drawn), world)
    taken: set[int] = set()
    for name, start in layout.starts.items():
        rows, columns = layout.shapes[name]
        elements = range(start, start + rows * columns)
        assert taken.isdisjoint(elements)
        taken.update(elements)
        rank = layout.owner(name)
        assert rank < world and elements[-1] < (rank + 1) * layout.part
    assert len(taken) == sum(r * c for unit in drawn for r, c in unit)
    assert list(layout.starts.values()) == sorted(layout.starts.values())
    assert [n for r in range(world) for n in layout.owned(r)] == list(layout.starts)


@given(units, st.integers(1, 17))
def test_units_stay_together_at_aligned_places(drawn, world: int) -> None:
    layout = Layout.of(named(drawn), world)
    for unit in named(drawn):
        first, *_ = starts = [layout.starts[name] for name in unit]
        assert (first - layout.owner(next(iter(unit))) * layout.part) % ALIGNED == 0
        assert layout.part % ALIGNED == 0
        for name, shape, start in zip(unit, unit.values(), starts, strict=True):
            assert start == first and layout.shapes[name] == shape
            first += shape[0] * shape[1]


@given(units, st.integers(1, 17))
def test_nobody_has_more_than_one_unit_too_much(drawn, world: int) -> None:
    layout = Layout.of(named(drawn), world)
    costs = [0] * world
    for name, shape in layout.shapes.items():
        costs[layout.owner(name)] += newton_schulz_cost(shape)
    largest = max(sum(map(newton_schulz_cost, unit)) for unit in drawn)
    assert max(costs) - min(costs) <= largest


def test_the_record_on_eight_ranks() -> None:
    """11 layers of 512: a part is little more than an eighth."""
    layer = [[(512, 512), (256, 512), (256, 512)], [(512, 512)], [(1536, 512)], [(512, 1536)]]
    layout = Layout.of(named(layer * 11), 8)
    elements = sum(r * c for r, c in layout.shapes.values())
    assert elements == 25_952_256 and layout.part * 8 <= 1.051 * elements
