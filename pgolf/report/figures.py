"""The figures of a report, each made from a run's files, with a text for screen readers."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pgolf.report.format import artifact_parts, decimal, percent, si, stored_as
from pgolf.report.markup import Markup, join, tag
from pgolf.report.page_style import LIGHT
from pgolf.report.plots import in_units, inline, new, short, spread, style
from pgolf.report.read import RunFiles, mapping, number, objects

# Lines of more points are thinned, points of more are not dotted, and tooltips of more are merged.
_MAX_POINTS, _MAX_DOTS, _MAX_TIPS = 600, 40, 120
_NOT_TENSORS = ("steps", "header", "code")
_FAMILIES = {"attn": "a", "mlp": "b"}  # colours of the two parts of a block

Point = tuple[float, float | None]  # a missing y leaves a gap in the line
Series = Mapping[str, tuple[Sequence[Point], str, int]]  # name -> points, colour, decimals


def figure(title: str, chart: Markup, caption: str, below: Markup | str = "") -> Markup:
    """A chart with its heading and a sentence that says how to read it."""
    return tag("figure", tag("h2", title), chart, below, tag("figcaption", caption))


def _points(entries: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """(tokens, value) of each entry, by rising tokens; a value that is not finite leaves a gap."""
    pairs = ((number(e.get("tokens")), number(e.get(key))) for e in entries)
    return sorted(((x, y) for x, y in pairs if x is not None and x >= 0), key=lambda p: p[0])


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points which keep every spike and gap: each stretch of the line is
    represented by its lowest, its highest and its first missing point."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    size = -(-len(points) * 3 // limit)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [i for i, (_, y) in enumerate(stretch) if y is not None]
        missing = [i for i, (_, y) in enumerate(stretch) if y is None]
        extremes = [f(known, key=lambda i: stretch[i][1]) for f in (min, max)] if known else []
        kept += [stretch[i] for i in sorted({*extremes, *missing[:1]})]
    return kept


def _course(name: str, points: Sequence[Point], places: int) -> str:
    """A line as text: where it begins and where it ends."""
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return f"{name}: no values"
    (_, first), (x, last) = known[0], known[-1]
    return f"{name}: {decimal(first, places)} first, {decimal(last, places)} at {si(x)} tokens"


def _draw_tips(axes: Any, series: Series, end: float, tips: dict[str, str]) -> None:
    """Invisible upright bands over a plot; each tells the values at its x."""
    from matplotlib.patches import Rectangle

    values: dict[float, list[str]] = {}
    for name, (points, _, places) in series.items():
        for x, y in points:
            if y is not None:
                values.setdefault(x, []).append(f"{name} {decimal(y, places)}")
    # Where points are thinned out of the tooltips, those with the most series stay.
    xs = sorted(values)
    size = -(-len(xs) // _MAX_TIPS) or 1
    xs = [max(xs[i : i + size], key=lambda x: len(values[x])) for i in range(0, len(xs), size)]
    borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(xs)), end]
    for x, (left, right) in zip(xs, itertools.pairwise(borders), strict=False):
        gid = f"band {len(tips)}"
        tips[gid] = "\n".join([f"{decimal(x, 0)} tokens", *values[x]])
        axes.add_artist(Rectangle((left, 0), right - left, 1, color=LIGHT["soft"], alpha=0,
                                  transform=axes.get_xaxis_transform(), linewidth=0, gid=gid))


def _draw_lines(axes: Any, series: Series, title: str, end: float, tips: dict[str, str]) -> None:
    """Series over tokens from 0 to `end`, with their names where there are several."""
    axes.set_title(title)
    axes.grid(axis="y")
    for name, (points, colour, _) in series.items():
        plotted = thinned(points)
        y = [math.nan if y is None else y for _, y in plotted]
        lone = [i for i, value in enumerate(y) if not math.isnan(value)
                and all(math.isnan(v) for v in y[max(i - 1, 0) : i] + y[i + 1 : i + 2])]
        axes.plot([x for x, _ in plotted], y, color=LIGHT[colour], linewidth=2, label=name,
                  marker="o", markeredgecolor=LIGHT["card"], markeredgewidth=0.8, zorder=3,
                  markevery=None if len(plotted) <= _MAX_DOTS else lone)
    if len(series) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=len(series),
                    borderaxespad=0, handlelength=1.5)
    axes.locator_params(axis="y", nbins=6)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(in_units(end))
    if all(y is None for points, _, _ in series.values() for _, y in points):
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center",
                  color=LIGHT["soft"])
    _draw_tips(axes, series, end, tips)


def _end(run: RunFiles, *others: float) -> float:
    """Where the axis of tokens ends: where the run did."""
    tokens = (number(e.get("tokens")) or 0.0 for e in (run.result, *run.train, *run.val))
    return max(*tokens, *others, 0.0) or 1.0


def _draw_references(axes: Any, references: Sequence[tuple[str, float, str]], gap: float) -> None:
    """(name, value, colour) as lines across a plot, named with their values at its right.

    Args:
        gap: between two names, as a share of the plot's height.
    """
    for _, value, colour in references:
        axes.axhline(value, color=LIGHT[colour], linewidth=1.5, linestyle=(0, (6, 4)))
    axes.autoscale_view()
    low, high = axes.get_ylim()
    at = [(value - low) / (high - low) for _, value, _ in references]
    for (name, value, colour), y, label in zip(references, at, spread(at, gap, 0, 1), strict=True):
        axes.plot([1, 1.02], [y, label], transform=axes.transAxes, color=LIGHT[colour],
                  linewidth=1, clip_on=False)
        axes.text(1.03, label, f"{short(name, 20)} {decimal(value, 4)}",
                  transform=axes.transAxes, va="center")


def loss_figure(run: RunFiles) -> Markup:
    """Training and validation loss over tokens."""
    series = {"training": (_points(run.train, "loss"), "a", 3),
              "validation": (_points(run.val, "loss"), "b", 3)}
    drawn, tips = new(250), {}
    axes = drawn.subplots()
    _draw_lines(axes, series, "nats per token", _end(run), tips)
    axes.set_xlabel(f"tokens, to {si(_end(run))}")
    summary = "; ".join(_course(name, points, 3) for name, (points, _, _) in series.items())
    return figure(
        "Loss", inline(drawn, "loss", f"Loss over training. {summary}.", tips),
        "Mean cross-entropy. Training loss is that of single batches; validation is on held-out "
        "documents in windows that do not overlap.")  # fmt: skip


def bpb_figure(run: RunFiles) -> Markup:
    """Validation BPB over tokens with the final scores and the compressors' as lines."""
    finals = [("decoded", run.result.get("val_bpb"), "c"),
              ("live", run.result.get("val_bpb_live"), "b")]
    compressors = [(name, mapping(b).get("bpb"), "rest")
                   for name, b in mapping(run.result.get("baselines")).items()]
    references = [(name, y, colour) for name, value, colour in finals + compressors
                  if (y := number(value)) is not None]
    val = _points(run.val, "bpb")
    drawn, tips = new(250), {}
    axes = drawn.subplots()
    _draw_lines(axes, {"validation": (val, "a", 4)}, "bits per byte", _end(run), tips)
    _draw_references(axes, references, 0.08)
    axes.set_xlabel(f"tokens, to {si(_end(run))}")
    summary = [_course("Validation", val, 4)]
    summary += [f"{name} {decimal(value, 4)}" for name, value, _ in references]
    stride = decimal(run.result.get("stride"), 0)
    return figure(
        "Bits per byte",
        inline(drawn, "bpb", f"Bits per byte over training. {'; '.join(summary)}.", tips),
        "The curve is scored while training, in windows that do not overlap. The final scores "
        f"slide a full window by {stride} tokens: more context, so usually lower. Compressors, on "
        "the same bytes, are for scale.")  # fmt: skip


def _draw_events(axes: Sequence[Any], events: Sequence[tuple[float, str]], end: float) -> None:
    """(tokens, text) as upright lines; those that are near each other share a label."""
    groups: list[list[int]] = []
    for i, (x, _) in enumerate(events):
        if not groups or x - events[groups[-1][0]][0] > 0.06 * end:
            groups.append([])
        groups[-1].append(i)
        for each in axes:
            each.axvline(x, color=LIGHT["soft"], linewidth=1, linestyle=(0, (2, 3)))
    for group in groups:
        label = f"{group[0] + 1}" + (f"–{group[-1] + 1}" if len(group) > 1 else "")
        axes[0].text(events[group[0]][0] / end, -0.02, label, transform=axes[0].transAxes,
                     ha="center", va="top", fontsize=11)


def schedule_figure(run: RunFiles) -> Markup:
    """Learning rate and momentum over tokens, with the events of the run."""
    events = sorted((x, str(e.get("text"))) for e in run.events
                    if (x := number(e.get("tokens"))) is not None and x >= 0)
    rate, momentum = _points(run.train, "lr_scale"), _points(run.train, "momentum")
    end = _end(run, *(x for x, _ in events))
    drawn, tips = new(320), {}
    axes = drawn.subplots(2, sharex=True, height_ratios=(3, 2))
    _draw_lines(axes[0], {"learning rate": (rate, "a", 3)}, "learning rate, share of peak", end,
                tips)
    axes[0].set_ylim(bottom=0)
    _draw_lines(axes[1], {"momentum": (momentum, "d", 4)}, "Muon momentum", end, tips)
    axes[1].locator_params(axis="y", nbins=4)
    axes[1].set_xlabel(f"tokens, to {si(end)}")
    _draw_events(axes, events, end)
    listed = tag("ol", *(tag("li", f"{text}, at {si(x)} tokens") for x, text in events))
    summary = "; ".join(f"{text} at {si(x)} tokens" for x, text in events) or "none"
    return figure(
        "Schedule",
        inline(drawn, "schedule", f"{_course('Learning rate, share of its peak', rate, 3)}. "
               f"{_course('Muon momentum', momentum, 3)}. Events: {summary}.", tips),
        "What multiplies every learning rate, and the momentum of the matrices; upright lines mark "
        "what changed on the way.", listed if events else "")  # fmt: skip


def _draw_strip(axes: Any, parts: Sequence[tuple[str, float, str]], budget: float) -> None:
    """(name, bytes, colour) end to end on an axis that holds the total and the budget."""
    total = sum(size for _, size, _ in parts)
    heading = f"{decimal(total, 0)} bytes"
    if budget:
        heading += f" of a budget of {decimal(budget, 0)}"
        axes.barh(0, budget, color=LIGHT["hair"])
        axes.axvline(budget, color=LIGHT["bad"], linewidth=2)
    used = 0.0
    for _, size, colour in parts:
        axes.barh(0, size, left=used, color=LIGHT[colour], edgecolor=LIGHT["card"], linewidth=0.5)
        used += size
    axes.set_title(heading, color=LIGHT["ink"])
    axes.set_xlim(0, max(total, budget))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(in_units(max(total, budget)))
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _draw_rows(axes: Any, rows: Sequence[tuple[str, float, str, str, str]],
               tips: dict[str, str]) -> None:
    """(name, length, colour, label at the end, tooltip) as bars from the top."""
    for i, (_, length, colour, label, tip) in enumerate(rows):
        gid = f"bar {len(tips)}"
        tips[gid] = tip
        axes.barh(i, length, height=0.68, color=LIGHT[colour], gid=gid)
        axes.annotate(label, (length, i), (5, 0), textcoords="offset points", va="center",
                      fontsize=11, color=LIGHT["soft"])
    axes.set_yticks(range(len(rows)), [short(name, 22) for name, *_ in rows], color=LIGHT["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # The label of the longest bar takes the rest.
    axes.set_xlim(0, 1.6 * max((length for _, length, *_ in rows), default=0.0) or 1.0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def size_figure(run: RunFiles) -> Markup:
    """Bytes by tensor group and code: end to end against the budget, then one by one."""
    budget = max(number(run.result.get("budget_bytes")) or 0.0, 0.0)
    parts = artifact_parts(run.result)
    total = sum(size for _, size in parts)
    colours = itertools.cycle("abcdef")
    styled = [(name, size, "rest" if name in _NOT_TENSORS else next(colours))
              for name, size in parts]
    drawn, tips = new(82 + 22.0 * len(parts)), {}
    if total:
        above, below = drawn.subfigures(2, height_ratios=(82, 22 * len(parts)))
        _draw_strip(above.subplots(), styled, budget)
        _draw_rows(below.subplots(), [
            (name, size, colour, f"{decimal(size, 0)}  ·  {percent(size / total, 1)}",
             f"{name}: {decimal(size, 0)} bytes") for name, size, colour in styled], tips)
    else:
        drawn.text(0.5, 0.5, "no sizes", ha="center", color=LIGHT["soft"])
    summary = ", ".join(f"{name} {decimal(size, 0)}" for name, size in parts) or "no sizes"
    limit = f"budget {decimal(budget, 0)}" if budget else "no budget"
    return figure(
        "Bytes", inline(drawn, "size", f"Bytes: {summary}; {limit}.", tips),
        "Compressed tensors by group, and the compressed code that decodes and scores.")


Bars = dict[str, list[tuple[str, float, str]]]  # part of a block, '' outside -> name, value, tip


def _bars(run: RunFiles, unit: str, measure: Callable[[dict[str, Any]], float | None]) -> Bars:
    """What `measure` gives for every matrix or table, in `unit`, by its part of a block."""
    bars: Bars = {}
    for t in objects(run.result.get("tensors")):
        name, value = str(t.get("name")), measure(t)
        if name.endswith(".weight") and value is not None:
            tip = f"{name}\n{decimal(value, 2)} {unit} as {stored_as(t)}"
            block = re.fullmatch(r"blocks\.(\d{1,6})\.(.*)\.weight", name, re.S)
            part, own = (block[2], block[1]) if block else ("", name.removesuffix(".weight"))
            bars.setdefault(part, []).append((own, max(value, 0.0), tip))
    return bars


def _draw_parts(axes: Any, bars: Bars, tips: dict[str, str]) -> None:
    """Two panels beside each other, of a bar a layer, for every two parts of a block."""
    from matplotlib.ticker import MaxNLocator


    panel = max(map(len, bars.values()))
    width = 1.15 * panel
    largest = max(value for group in bars.values() for _, value, _ in group) or 1.0
    ticks = MaxNLocator(3, steps=[1, 2, 2.5, 4, 5, 10]).tick_values(0, largest)
    top = ticks[-1]
    for i, (part, group) in enumerate(bars.items()):
        left, floor = width * (i % 2), -1.7 * (i // 2)
        axes.text(left, floor + 1.12, short(part, 24))
        for tick in ticks:
            y = floor + tick / top
            axes.plot([left, left + panel], [y, y], linewidth=1, zorder=1,
                      color=LIGHT["hair" if tick else "soft"])
            if i % 2 == 0:
                axes.annotate(f"{tick:g}", (left, y), (-6, 0), textcoords="offset points",
                              ha="right", va="center", fontsize=11, color=LIGHT["soft"])
        every = -(-len(group) // 14)  # where layers are many, each second one or so is named
        for x, (layer, value, tip) in enumerate(group):
            gid = f"bar {len(tips)}"
            tips[gid] = tip
            axes.bar(left + x + 0.5, value / top, bottom=floor, gid=gid,
                     color=LIGHT[_FAMILIES.get(part.split(".")[0], "c")])
            if x % every == 0:
                axes.annotate(layer, (left + x + 0.5, floor), (0, -4), textcoords="offset points",
                              ha="center", va="top", fontsize=11, color=LIGHT["soft"])
    axes.set_xlim(0, width + panel)
    axes.set_ylim(floor - 0.1, 1.3)
    axes.set_axis_off()


def _tensor_chart(name: str, what: str, unit: str, bars: Bars) -> Markup:
    """A panel for each part of a block with a bar a layer, and a row for each other tensor."""
    outside = bars.pop("", [])
    everything = [bar for group in (*bars.values(), outside) for bar in group]
    heights = [90.0 * -(-len(bars) // 2), 22.0 * len(outside)]
    drawn, tips = new(max(sum(heights) + 20, 60.0)), {}
    above, below = drawn.subfigures(2, height_ratios=[max(h, 1.0) for h in heights])
    if bars:
        _draw_parts(above.subplots(), bars, tips)
    if outside:
        _draw_rows(below.subplots(), [(own, value, "c", decimal(value, 2), tip)
                                      for own, value, tip in outside], tips)
    if not everything:
        drawn.text(0.5, 0.5, "no tensors", ha="center", color=LIGHT["soft"])
    largest = max(everything, key=lambda bar: bar[1])[2] if everything else "none"
    return inline(
        drawn, name, f"{what} of {len(everything)} tensors, in {unit}; largest: {largest}.", tips)


def bits_figure(run: RunFiles) -> Markup:
    """Bits a weight of every matrix and table in the file."""

    def bits(t: dict[str, Any]) -> float | None:
        size, shape = number(t.get("bytes")), t.get("shape")
        sides = [number(side) for side in shape] if isinstance(shape, list) else [None]
        count = 0.0 if None in sides else math.prod(sides)
        return None if size is None or count < 1 else number(8 * size / count)

    return figure("Bits a weight", _tensor_chart("bits", "Bits", "bits", _bars(run, "bits", bits)),
                  "One bar a matrix or table, by layer: its compressed codes and steps, over its "
                  "weights.")


def error_figure(run: RunFiles) -> Markup:
    """What storing every matrix and table is expected to cost, or else its relative error."""

    def loss(t: dict[str, Any]) -> float | None:
        value = number(t.get("loss"))
        return None if value is None else number(1e6 * value)

    def error(t: dict[str, Any]) -> float | None:
        value = number(t.get("relative_error"))
        return None if value is None else number(100 * value)

    bars, title = _bars(run, "µnats", loss), "Quantisation error, millionths of a nat a token"
    if bars:
        chart = _tensor_chart("error", "Expected loss", "µnats", bars)
        meaning = ("what its rounding is expected to add to the loss, by the inputs and gradients "
                   "of the calibration text.")
    else:
        chart = _tensor_chart("error", "Quantisation error", "%", _bars(run, "%", error))
        title = "Quantisation error, %"
        meaning = ("the norm of its change by storing it as a share of its own norm. Those near "
                   "zero are stored as float16.")
    return figure(title, chart, f"One bar a matrix or table, by layer: {meaning}")


def all_figures(run: RunFiles) -> Markup:
    """The figures in the order of the page."""
    with style():
        return join(draw(run) for draw in
                    (bpb_figure, loss_figure, schedule_figure, size_figure, bits_figure,
                     error_figure))
