"""Bar charts: the artifact's bytes against the budget, and errors grouped by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgolf.report.axis import make_axis
from pgolf.report.markup import Markup, join, tag
from pgolf.report.svg import line, short, svg, text_width, write, y_axis_marks
from pgolf.report.words import decimal, percent

_STYLES = "abcdef"
_NOT_TENSORS = ("scales", "header", "code")


def _rect(x: float, y: float, width: float, height: float, style: str) -> Markup:
    return tag("rect", x=x, y=y, width=max(width, 0.0), height=height, class_=f"bar {style}")


def _strip(parts: Sequence[tuple[str, float, str]], total: float, budget: float) -> Markup:
    """All parts end to end on an axis that holds the total and the budget."""
    left, right, top, height = 1.0, 548.0, 26.0, 22.0
    x = make_axis([total, budget], zero=True, cover=False, short=True)

    def px(size: float) -> float:
        return left + (right - left) * x.share(size)

    used, segments = 0.0, []
    for name, size, style in parts:
        segments.append(tag(
            "g",
            tag("title", f"{name}: {decimal(size, 0)} bytes, {percent(size / total, 1)}"),
            _rect(px(used), top, px(used + size) - px(used), height, style),
        ))
        used += size
    heading = f"{decimal(total, 0)} bytes"
    if budget:
        heading += f" of {decimal(budget, 0)}"
        segments.append(line(px(budget), top - 6, px(budget), top + height + 6, "limit"))
    return join((
        _rect(left, top, px(budget or total) - left, height, "room"),
        *segments,
        write(heading, 0, 14, "label"),
        write("budget", px(budget), 14, "label", "end") if budget else "",
        *(write(t, px(v), top + height + 20, "tick", "middle" if v else "start")
          for v, t in zip(x.ticks, x.labels, strict=True)),
    ))


def size_chart(label: str, parts: Sequence[tuple[str, float]], budget: float) -> Markup:
    """Bytes of each part: end to end against the budget, then one by one.

    Args:
        label: the whole chart in words.
        parts: (name, bytes).
        budget: in bytes; 0 draws none.
    """
    total = sum(size for _, size in parts)
    if not total:
        return svg(label, 560, 60, write("no sizes", 280, 34, "axis-label", "middle"))
    styled = [
        (name, size, "rest" if name in _NOT_TENSORS else _STYLES[i % len(_STYLES)])
        for i, (name, size) in enumerate(parts)
    ]
    names, values = 138.0, 140.0
    largest = max(size for _, size in parts)
    rows = []
    for i, (name, size, style) in enumerate(styled):
        y = 92.0 + 25 * i
        width = (560 - names - values) * size / largest
        rows.append(tag(
            "g",
            tag("title", f"{name}: {decimal(size, 0)} bytes"),
            write(short(name, 19), names - 10, y + 12, "label", "end"),
            _rect(names, y, max(width, 1.0), 16, style),
            write(f"{decimal(size, 0)}  ·  {percent(size / total, 1)}", names + width + 8, y + 12,
                  "value"),
        ))
    return svg(label, 560, 92 + 25 * len(rows), _strip(styled, total, budget), *rows)


@dataclass(frozen=True)
class Bar:
    """One bar: its height, the family that colours it, and what its tooltip says."""

    value: float
    family: str
    tip: str


def _bar_legend(families: Mapping[str, str], right: float) -> Markup:
    parts, x = [], right
    for family, style in reversed(families.items()):
        x -= text_width(family)
        parts += [write(family, x, 16, "label"), _rect(x - 18, 7, 11, 11, style)]
        x -= 34
    return join(parts)


def grouped_bars(
    label: str,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    families: Mapping[str, str],
    y_label: str,
    x_label: str,
) -> Markup:
    """Bars side by side in named groups.

    Args:
        label: the whole chart in words.
        groups: (name, bars), left to right.
        families: family of a bar -> style class, in the order of the legend.
        y_label: quantity and unit of the bars.
        x_label: what the groups are, written left of their names.
    """
    width, height, top, bottom = 1120.0, 280.0, 34.0, 252.0
    y = make_axis([b.value for _, bars in groups for b in bars], zero=True)
    left = max(48.0, max(map(text_width, y.labels)) + 14)
    right = width - 4
    # A gap between groups is as wide as one bar and a half.
    slots = sum(len(bars) + 1.5 for _, bars in groups)
    slot = min((right - left) / max(slots, 1.0), 34.0)
    x, shown = left + (right - left - slots * slot) / 2 + 0.75 * slot, []
    for name, bars in groups:
        middle = x + slot * len(bars) / 2
        shown.append(write(name, middle, bottom + 17, "tick", "middle"))
        for bar in bars:
            # Even no error leaves a stub, so that every bar can be seen and pointed at.
            size = max((bottom - top) * y.share(bar.value), 1.0)
            shown.append(tag(
                "g", tag("title", bar.tip),
                _rect(x + 0.08 * slot, bottom - size, 0.84 * slot, size, families[bar.family]),
            ))
            x += slot
        x += 1.5 * slot
    return svg(
        label, width, height,
        write(y_label, 0, 16, "axis-label"),
        _bar_legend(families, right),
        y_axis_marks(left, right, y, lambda v: bottom - (bottom - top) * y.share(v)),
        *shown,
        line(left, bottom, right, bottom, "base"),
        write(x_label, left - 8, bottom + 17, "axis-label", "end"),
    )
