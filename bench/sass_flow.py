"""The instructions of a kernel's SASS that a warp executes, given the trip counts of its loops.

The control flow consists of basic blocks and natural loops. Of the ways through it, one is taken:

- none that calls a subroutine (the long divisions, roots and reciprocals of rare arguments) or that
  lanes apart take (BRA.DIV), where there is another;
- of those, the one that stores as many bytes as the warp's work does, or loads as many if that
  stores almost nothing: the compiler's versions of a loop for other lengths are left out;
- of those, the one that loads (stores) the most bytes: optional operands are there, vectors are
  wide; and then the one with the most instructions, or with the fewest if the caller says that the
  remaining choices are rare.

An instruction that its predicate switches off is issued all the same, and counts; of accesses under
a predicate and under its opposite, those of fewer bytes are taken for switched off. If lanes of one
warp take both sides of a branch, only one side counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.sass import Instruction, basic_blocks


@dataclass
class Loop:
    """A natural loop: its first block, all its blocks, and those that jump back."""

    header: int
    blocks: set[int]
    latches: set[int]


# A way: what decides between it and others, and its pieces from the last one to the first.
# A piece is a block, or (way through a loop's body, how often).
@dataclass(frozen=True)
class Way:
    slow: int = 0
    matched: int = 0  # bytes, of those accesses that have to be so many
    others: int = 0  # of the others
    count: int = 0
    shortest: bool = False
    pieces: Any = None

    def key(self) -> tuple[int, int, int]:
        return self.slow, -self.others, self.count if self.shortest else -self.count

    def then(self, other: "Way", piece: Any, times: int = 1) -> "Way":
        return Way(
            self.slow + other.slow * times, self.matched + other.matched * times,
            self.others + other.others * times, self.count + other.count * times,
            self.shortest or other.shortest, (self.pieces, piece),
        )  # fmt: skip


Ways = dict[int, Way]  # bytes matched -> the best way of as many
Exits = dict[tuple[int, int], Ways]  # edge that leaves a loop -> ways from its entry through it


def _add(ways: Ways, way: Way) -> None:
    known = ways.get(way.matched)
    if known is None or way.key() < known.key():
        ways[way.matched] = way


class Flow:
    """The control flow of one kernel.

    Attributes:
        blocks: in the order of their addresses.
        loops: in the order of their first blocks' addresses, outer ones before those within.

    Raises:
        ValueError: it has no EXIT, jumps through a register, or has a cycle with two entries.
    """

    def __init__(self, sass: str) -> None:
        self.blocks = basic_blocks(sass)
        self.loops = self._find_loops()

    def executed(
        self, trips: Sequence[int], stored: int, loaded: int = 0, shortest: bool = False
    ) -> list[Instruction]:
        """The instructions of one warp from the entry to EXIT.

        Args:
            trips: of each of `loops`.
            stored, loaded: bytes that a lane stores to global memory and loads from it; the latter
                matter where less than 16 are stored.
            shortest: of ways that move the same, that of the fewest instructions, not of the most.

        Raises:
            ValueError: not as many trip counts as loops, or no way moves so many bytes, be it for
                16 bytes or 5 %; with what the loops do.
        """
        loops = "; ".join(self.describe(loop) for loop in self.loops) or "none"
        if len(trips) != len(self.loops):
            raise ValueError(f"{len(trips)} trip counts for {len(self.loops)} loops: {loops}")
        self._matched, verb, expected = (
            ("STG", "stores", stored) if stored >= 16 or not loaded else ("LDG", "loads", loaded)
        )
        self._shortest = shortest
        exits: dict[int, Exits] = {}
        for i in sorted(range(len(trips)), key=lambda i: len(self.loops[i].blocks)):
            self._close(self.loops[i], trips[i], exits)
        ends, _, _ = self._ways(set(self._reached()), 0, exits)
        best = min(ends.values(), key=lambda w: (w.slow, abs(w.matched - expected), *w.key()))
        if abs(best.matched - expected) > max(16, expected // 20):
            raise ValueError(
                f"a lane {verb} {best.matched} bytes, not {expected}, with these trips: {loops}"
            )
        return [i for block in _linear(best.pieces) for i in self.blocks[block].instructions]

    def describe(self, loop: Loop) -> str:
        """Depth, instructions and memory accesses, to recognise it by."""
        depth = sum(loop.blocks < other.blocks for other in self.loops)
        instructions = [i for b in loop.blocks for i in self.blocks[b].instructions]
        kinds = [f"{i.base}x{i.width}" for i in instructions if i.width]
        moved = " ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds)))
        return f"depth {depth} {len(instructions)} instructions {moved or 'no global access'}"

    def _reached(self) -> list[int]:
        """Blocks that can be reached from the first one, in reverse postorder."""
        return _topological(0, lambda block: self.blocks[block].after)

    def _find_loops(self) -> list[Loop]:
        order = self._reached()
        place = {block: i for i, block in enumerate(order)}
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for after in self.blocks[block].after:
                before[after].append(block)
        above = _dominators(order, before)
        loops: dict[int, Loop] = {}
        for block in order:
            for header in self.blocks[block].after:
                if place[header] > place[block]:
                    continue
                if header not in above[block]:
                    raise ValueError("a cycle has two entries")
                loop = loops.setdefault(header, Loop(header, {header}, set()))
                loop.latches.add(block)
                waiting = [block]
                while waiting:
                    if (inside := waiting.pop()) not in loop.blocks:
                        loop.blocks.add(inside)
                        waiting += before[inside]
        return sorted(loops.values(), key=lambda loop: (loop.header, -len(loop.blocks)))

    def _close(self, loop: Loop, trips: int, exits: dict[int, Exits]) -> None:
        """exits[header] = the best ways from the loop's entry through each edge that leaves it."""
        inner = {h: ways for h, ways in exits.items() if h in loop.blocks}
        _, cycles, leaving = self._ways(loop.blocks, loop.header, inner)
        exits[loop.header] = {}
        for (source, to), lasts in leaving.items():
            # A test at the end belongs to the last trip, one at the top to none.
            times = trips - (source in loop.latches)
            wholes = exits[loop.header][source, to] = {}
            if times < 0:  # it would be executed: only where nothing leads around it
                _add(wholes, Way(slow=1))
                continue
            befores = [Way().then(c, (c.pieces, times), times) for c in cycles.values()]
            for before in befores if times else [Way()]:
                for last in lasts.values():
                    _add(wholes, before.then(last, (last.pieces, 1)))

    def _ways(
        self, region: set[int], entry: int, loops: Mapping[int, Exits]
    ) -> tuple[Ways, Ways, Exits]:
        """Best ways from `entry` (to the end, back to it, through each edge out of the region)."""
        closed = {h: exits for h, exits in loops.items() if h != entry}

        def edges(node: int) -> list[tuple[int, int, list[tuple[Way, Any]]]]:
            if node in closed:
                return [
                    (source, to, [(way, (way.pieces, 1)) for way in ways.values()])
                    for (source, to), ways in closed[node].items()
                ]
            return [(node, to, [(self._cost(node, to), node)]) for to in self.blocks[node].after]

        order = _topological(
            entry, lambda n: [to for _, to, _ in edges(n) if to in region and to != entry]
        )
        arrived: dict[int, Ways] = {node: {} for node in order}
        _add(arrived[entry], Way())
        ends: Ways = {}
        cycles: Ways = {}
        leaving: Exits = {}
        for node in order:
            for way in arrived[node].values():
                if node not in closed and not self.blocks[node].after:
                    _add(ends, way.then(self._cost(node), node))
                for source, to, costs in edges(node):
                    known = (
                        cycles if to == entry
                        else arrived[to] if to in region
                        else leaving.setdefault((source, to), {})
                    )  # fmt: skip
                    for cost, piece in costs:
                        _add(known, way.then(cost, piece))
        return ends, cycles, leaving

    def _cost(self, block: int, to: int | None = None) -> Way:
        piece = self.blocks[block]
        off = piece.off_before(to)
        moved = [
            (i.base == self._matched, i.bytes)
            for n, i in enumerate(piece.instructions)
            if i.bytes and n not in off
        ]
        matched = sum(size for is_matched, size in moved if is_matched)
        others = sum(size for is_matched, size in moved if not is_matched)
        return Way(piece.slow, matched, others, len(piece.instructions), self._shortest)


def _topological(entry: int, after: Any) -> list[int]:
    """Reverse postorder from an entry."""
    order, seen, stack = [], {entry}, [(entry, iter(after(entry)))]
    while stack:
        node, rest = stack[-1]
        for to in rest:
            if to not in seen:
                seen.add(to)
                stack.append((to, iter(after(to))))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


def _dominators(order: Sequence[int], before: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """The blocks that every way to a block leads through, itself among them."""
    above = {block: set(order) for block in order}
    above[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            dominators = set.intersection(*(above[b] for b in before[block])) | {block}
            if dominators != above[block]:
                above[block], changed = dominators, True
    return above


def _linear(pieces: Any) -> list[int]:
    """The blocks of a way in the order in which they are executed."""
    reverse = []
    while pieces is not None:
        pieces, piece = pieces
        reverse.append([piece] if isinstance(piece, int) else _linear(piece[0]) * piece[1])
    return [block for part in reversed(reverse) for block in part]


def loads_in_flight(executed: Sequence[Instruction]) -> int:
    """The most global loads that were issued when the value of one of them was first needed."""
    waiting: list[list[int]] = []  # the registers of each load, oldest first
    most = 0
    for instruction in executed:
        if instruction.off:
            continue
        written, read = instruction.registers
        touched = {*written, *read}
        used = [i for i, load in enumerate(waiting) if touched & set(load)]
        if used:
            most = max(most, len(waiting))
            waiting = waiting[used[-1] + 1 :]
        if instruction.base == "LDG":
            waiting.append(written)
    return max(most, len(waiting))
