"""What every chart is drawn from: inline SVG that scales with the page.

Everything is drawn in the units of the viewBox. Colours come from the page's style sheet through
classes (`a`, `b`, ... for what is compared), so charts follow its light and dark theme. Whatever is
coloured is also named beside it, so colour alone never carries the meaning.
"""

from collections.abc import Callable, Sequence

from pgolf.report.axis import Axis
from pgolf.report.markup import Markup, join, tag


def text_width(words: str) -> float:
    """A generous estimate of the width of 12-unit text: fonts differ, and nobody measures here."""
    return sum(12.0 if ord(c) > 0x2E80 else 6.8 for c in words)


def svg(label: str, width: float, height: float, *children: Markup) -> Markup:
    """The outer element; `label` is what a screen reader says instead of the drawing."""
    return tag(
        "svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label
    )


def write(words: str, x: float, y: float, style: str = "", anchor: str = "start") -> Markup:
    """One line of text."""
    return tag("text", words, x=x, y=y, class_=style or None,
               text_anchor=None if anchor == "start" else anchor)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight stroke."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def short(words: str, limit: int = 32) -> str:
    """At most `limit` characters."""
    return words if len(words) <= limit else words[: limit - 1] + "…"


def y_axis_marks(left: float, right: float, y: Axis, to_y: Callable[[float], float]) -> Markup:
    """Grid lines with their labels at the left."""
    return join(
        join((
            line(left, to_y(t), right, to_y(t), "gridline"),
            write(label, left - 8, to_y(t) + 4, "tick", "end"),
        ))
        for t, label in zip(y.ticks, y.labels, strict=True)
    )


def spread(wanted: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Positions near the wanted ones, in the same order, `gap` apart where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = lowest
    for i in order:
        placed[i] = floor = max(wanted[i], floor)
        floor += gap
    ceiling = highest
    for i in reversed(order):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed
