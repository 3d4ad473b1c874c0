"""Line charts: series over one x axis that begins at 0, reference lines, events, tooltips."""

from collections.abc import Sequence
from dataclasses import dataclass

from pgolf.report.axis import Axis, make_axis
from pgolf.report.markup import Markup, join, tag
from pgolf.report.svg import line, short, spread, svg, text_width, write, y_axis_marks
from pgolf.report.words import decimal

WIDTH = 560.0
# Lines of more points are thinned, points of more are not dotted, and bands of more are merged.
_MAX_POINTS, _MAX_DOTS, _MAX_BANDS = 600, 40, 160
_MAX_EVENT_ROWS, _EVENT_ROW = 4, 16.0

Point = tuple[float, float | None]  # a missing y leaves a gap in the line


@dataclass(frozen=True)
class Series:
    """One line: points by rising x, the class that colours it, and decimals in its tooltip."""

    name: str
    points: Sequence[Point]
    style: str
    places: int = 3


@dataclass(frozen=True)
class Reference:
    """A horizontal line across the plot, named with its value at the right."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Event:
    """Something that happened at `x`."""

    x: float
    text: str


@dataclass(frozen=True)
class _Plot:
    """The plotting area (its borders in viewBox units) and its axes."""

    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis

    def px(self, x: float) -> float:
        return self.left + (self.right - self.left) * self.x.share(x)

    def py(self, y: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.y.share(y)


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points which keep every spike and gap: each stretch of the line is
    represented by its lowest, its highest and its first missing point."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    size = -(-len(points) * 3 // limit)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        there = [i for i, (_, y) in enumerate(stretch) if y is not None]
        missing = [i for i, (_, y) in enumerate(stretch) if y is None]
        extremes = [f(there, key=lambda i: stretch[i][1]) for f in (min, max)] if there else []
        kept += [stretch[i] for i in sorted({*extremes, *missing[:1]})]
    return kept


def _legend(series: Sequence[Series], right: float) -> Markup:
    """Names of the series, right-aligned above the plot; a single series needs none."""
    parts, x = [], right
    for s in reversed(series if len(series) > 1 else ()):
        x -= text_width(s.name)
        parts += [write(s.name, x, 16, "label"), line(x - 24, 12, x - 6, 12, f"line {s.style}")]
        x -= 40
    return join(parts)


def _event_rows(events: Sequence[Event], x: Axis, left: float, right: float) -> list[int | None]:
    """A row for each event's label so that no two overlap; None where there is no room."""
    ends: list[float] = []
    rows: list[int | None] = []
    for event in events:
        start = _label_start(event, left + (right - left) * x.share(event.x), right)
        row = next((r for r, end in enumerate(ends) if end + 10 <= start), len(ends))
        if row == _MAX_EVENT_ROWS:
            rows.append(None)
            continue
        if row == len(ends):
            ends.append(0.0)
        ends[row] = start + text_width(short(event.text))
        rows.append(row)
    return rows


def _label_start(event: Event, x: float, right: float) -> float:
    """Left end of an event's label: right of its line, or left of it near the right border."""
    width = text_width(short(event.text))
    return x + 4 if x + 4 + width <= right else max(x - 4 - width, 0.0)


def _draw_events(events: Sequence[Event], rows: Sequence[int | None], plot: _Plot) -> Markup:
    parts = []
    for event, row in zip(events, rows, strict=True):
        x = plot.px(event.x)
        label_y = plot.top if row is None else 36 + _EVENT_ROW * row
        start = _label_start(event, x, plot.right)
        # Widths are estimates, so a label left of its line is anchored at its right end.
        at, anchor = (start, "start") if start > x else (x - 4, "end")
        parts.append(tag(
            "g",
            tag("title", f"{event.text}, at {decimal(event.x, 0)} tokens"),
            line(x, label_y - 8 if row is not None else plot.top, x, plot.bottom, "event"),
            write(short(event.text), at, label_y, "event-label", anchor) if row is not None else "",
        ))
    return join(parts)


def _reference_label(r: Reference) -> str:
    return f"{short(r.name, 20)} {decimal(r.value, 4)}"


def _draw_references(references: Sequence[Reference], plot: _Plot) -> Markup:
    heights = [plot.py(r.value) for r in references]
    parts = []
    for r, y, label_y in zip(references, heights,
                             spread(heights, 15, plot.top, plot.bottom), strict=True):
        label = _reference_label(r)
        parts.append(tag(
            "g",
            tag("title", label),
            line(plot.left, y, plot.right, y, f"reference {r.style}"),
            tag("path", d=f"M{plot.right:.1f} {y:.1f}L{plot.right + 8:.1f} {label_y:.1f}",
                class_=f"leader {r.style}"),
            write(label, plot.right + 11, label_y + 4, f"reference-label {r.style}"),
        ))
    return join(parts)


def _draw_series(s: Series, plot: _Plot) -> Markup:
    points = thinned(s.points)
    runs: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append(f"{plot.px(x):.1f} {plot.py(y):.1f}")
    # A lone point is drawn as a line to itself, which round caps make visible.
    path = "".join("M" + "L".join(run if len(run) > 1 else run * 2) for run in runs if run)
    dots = [(x, y) for x, y in points if y is not None] if len(points) <= _MAX_DOTS else []
    return join((
        tag("path", d=path, class_=f"line {s.style}") if path else "",
        *(tag("circle", cx=plot.px(x), cy=plot.py(y), r=2.6, class_=f"dot {s.style}")
          for x, y in dots),
    ))


def _draw_bands(series: Sequence[Series], plot: _Plot) -> Markup:
    """Invisible upright bands over the plot: each shows a guide and tells the values at its x."""
    values: dict[float, list[tuple[Series, float]]] = {}
    for s in series:
        for x, y in s.points:
            if y is not None:
                values.setdefault(x, []).append((s, y))
    # Where points are thinned out of the tooltips, those with the most series stay.
    xs = sorted(values)
    size = -(-len(xs) // _MAX_BANDS) or 1
    xs = [max(xs[i : i + size], key=lambda x: len(values[x])) for i in range(0, len(xs), size)]
    at = [plot.px(x) for x in xs]
    borders = [plot.left, *((a + b) / 2 for a, b in zip(at, at[1:], strict=False)), plot.right]
    return join(
        tag(
            "g",
            tag("title", "\n".join([f"{decimal(x, 0)} tokens"] + [
                f"{s.name} {decimal(y, s.places)}" for s, y in values[x]
            ])),
            tag("rect", x=borders[i], y=plot.top, width=max(borders[i + 1] - borders[i], 0.1),
                height=plot.bottom - plot.top),
            line(at[i], plot.top, at[i], plot.bottom, "guide"),
            *(tag("circle", cx=at[i], cy=plot.py(y), r=4.5, class_=f"dot {s.style}")
              for s, y in values[x]),
            class_="band",
        )
        for i, x in enumerate(xs)
    )


def line_chart(
    label: str,
    series: Sequence[Series],
    y_label: str,
    x_end: float | None = None,
    references: Sequence[Reference] = (),
    events: Sequence[Event] = (),
    height: float = 300.0,
    name_events: bool = True,
    x_label: str = "tokens",
    y_zero: bool = False,
) -> Markup:
    """Series over tokens.

    Args:
        label: the whole chart in words.
        series: lines; those without points still stand in the legend.
        y_label: quantity and unit of the y axis.
        x_end: least end of the x axis, which begins at 0.
        references: horizontal lines.
        events: vertical lines, labelled above the plot if `name_events`.
        height: of the drawing, in viewBox units of 560 in width.
        name_events: False draws the lines of the events without their labels.
        x_label: quantity of the x axis; '' leaves it out where another chart stands below.
        y_zero: whether the y axis begins at 0, too.
    """
    xs = [x for s in series for x, _ in s.points] + [e.x for e in events]
    ys = [y for s in series for _, y in s.points if y is not None] + [r.value for r in references]
    x = make_axis([*xs, x_end or 0.0], zero=True, cover=False, short=True)
    y = make_axis(ys, count=5 if height > 200 else 3, zero=y_zero)
    left = max(48.0, max(map(text_width, y.labels)) + 14)
    right = WIDTH - max([16.0, *(text_width(_reference_label(r)) + 16 for r in references)])
    rows = _event_rows(events, x, left, right) if name_events else [None] * len(events)
    used = len({r for r in rows if r is not None})
    plot = _Plot(left, right, 28 + _EVENT_ROW * used, height - (40 if x_label else 22), x, y)
    return svg(
        label, WIDTH, height,
        write(y_label, 0, 16, "axis-label"),
        _legend(series, right),
        y_axis_marks(left, right, y, plot.py),
        *(write(t, plot.px(v), plot.bottom + 17, "tick", "middle")
          for v, t in zip(x.ticks, x.labels, strict=True)),
        write(x_label, (left + right) / 2, height - 4, "axis-label", "middle") if x_label else "",
        line(left, plot.bottom, right, plot.bottom, "base"),
        _draw_events(events, rows, plot),
        _draw_references(references, plot),
        *(_draw_series(s, plot) for s in series),
        "" if ys else write("no values", (left + right) / 2, (plot.top + plot.bottom) / 2,
                            "axis-label", "middle"),
        _draw_bands(series, plot),
    )
