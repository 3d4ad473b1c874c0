"""The charts of a report, each made from a run's files, with its words for screen readers."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from pgolf.report.bars import Bar, grouped_bars, size_chart
from pgolf.report.lines import Event, Point, Reference, Series, line_chart
from pgolf.report.markup import Markup, join, tag
from pgolf.report.read import RunFiles, mapping, number, objects
from pgolf.report.words import artifact_parts, decimal, si, stored_as

_FAMILIES = {"attention": "a", "MLP": "b", "other": "c"}


def figure(title: str, chart: Markup, caption: str, wide: bool = False) -> Markup:
    """A chart with its heading and a sentence that says how to read it."""
    return tag(
        "figure", tag("h2", title), tag("div", chart, class_="chart"), tag("figcaption", caption),
        class_="wide" if wide else None,
    )


def _points(entries: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """(tokens, value) of each entry, by rising tokens; a value that is not finite leaves a gap."""
    found = ((number(e.get("tokens")), number(e.get(key))) for e in entries)
    return sorted(((x, y) for x, y in found if x is not None and x >= 0), key=lambda p: p[0])


def _course(name: str, points: list[Point], places: int) -> str:
    """A line in words: where it begins and where it ends."""
    there = [(x, y) for x, y in points if y is not None]
    if not there:
        return f"{name}: no values"
    (_, first), (x, last) = there[0], there[-1]
    return f"{name}: {decimal(first, places)} first, {decimal(last, places)} at {si(x)} tokens"


def loss_figure(run: RunFiles) -> Markup:
    """Training and validation loss over tokens."""
    train, val = _points(run.train, "loss"), _points(run.val, "loss")
    chart = line_chart(
        "Loss over training. "
        + "; ".join((_course("Training", train, 3), _course("validation", val, 3))) + ".",
        [Series("training", train, "a"), Series("validation", val, "b")],
        "nats per token", number(run.result.get("tokens")),
    )
    return figure("Loss", chart, "Mean cross-entropy. Training loss is that of single batches; "
                  "validation is on held-out documents in windows that do not overlap.")


def bpb_figure(run: RunFiles) -> Markup:
    """Validation BPB over tokens with the final scores and the compressors' as lines."""
    val = _points(run.val, "bpb")
    finals = [("decoded", run.result.get("val_bpb"), "c"),
              ("live", run.result.get("val_bpb_live"), "b")]
    compressors = [(name, mapping(b).get("bpb"), "rest")
                   for name, b in mapping(run.result.get("baselines")).items()]
    references = [Reference(name, y, style) for name, value, style in finals + compressors
                  if (y := number(value)) is not None]
    words = [_course("Validation", val, 4)]
    words += [f"{r.name} {decimal(r.value, 4)}" for r in references]
    chart = line_chart(
        f"Bits per byte over training. {'; '.join(words)}.", [Series("validation", val, "a", 4)],
        "bits per byte", number(run.result.get("tokens")), references,
    )
    stride = decimal(run.result.get("stride"), 0)
    return figure("Bits per byte", chart, "The curve is scored while training, in windows that do "
                  f"not overlap. The final scores slide a full window by {stride} tokens: more "
                  "context, so usually lower. Compressors, on the same bytes, are for scale.")


def schedule_figure(run: RunFiles) -> Markup:
    """Learning rate and momentum over tokens, with the events of the run."""
    rate, momentum = _points(run.train, "lr_scale"), _points(run.train, "momentum")
    events = [Event(x, str(e.get("text"))) for e in run.events
              if (x := number(e.get("tokens"))) is not None and x >= 0]
    end = number(run.result.get("tokens"))
    words = "; ".join(f"{e.text} at {si(e.x)} tokens" for e in events) or "none"
    charts = (
        line_chart(f"{_course('Learning rate, share of its peak', rate, 3)}. Events: {words}.",
                   [Series("learning rate", rate, "a")], "learning rate, share of peak", end,
                   events=events, height=210, x_label="", y_zero=True),
        line_chart(f"{_course('Muon momentum', momentum, 3)}.",
                   [Series("momentum", momentum, "d", 4)], "Muon momentum", end,
                   events=events, height=150, name_events=False),
    )
    return figure("Schedule", join(charts), "What multiplies every learning rate, and the momentum "
                  "of the matrices; upright lines mark what changed on the way.")


def size_figure(run: RunFiles) -> Markup:
    """Bytes by tensor group and code against the budget."""
    parts, budget = artifact_parts(run.result), number(run.result.get("budget_bytes")) or 0.0
    words = ", ".join(f"{name} {decimal(size, 0)}" for name, size in parts) or "no sizes"
    limit = f"budget {decimal(budget, 0)}" if budget else "no budget"
    return figure("Bytes", size_chart(f"Bytes: {words}; {limit}.", parts, max(budget, 0.0)),
                  "Compressed tensors by group, and the compressed code that decodes and scores.")


def _family(name: str) -> str:
    """attention or MLP, by the part of the block that a tensor belongs to."""
    parts = name.split(".")
    return "attention" if "attn" in parts else "MLP" if "mlp" in parts else "other"


def _tensor_chart(
    run: RunFiles,
    what: str,
    unit: str,
    axis: str,
    measure: Callable[[dict[str, Any]], float | None],
) -> Markup:
    """One bar a matrix or table, grouped by layer, of what `measure` gives for it in `unit`."""
    layers: dict[int | None, list[Bar]] = {}
    for t in objects(run.result.get("tensors")):
        name, value = str(t.get("name")), measure(t)
        if name.endswith(".weight") and value is not None:
            block = re.match(r"blocks\.(\d{1,6})\.", name)
            tip = f"{name}\n{decimal(value, 2)} {unit} as {stored_as(t)}"
            bar = Bar(max(value, 0.0), _family(name), tip)
            layers.setdefault(int(block[1]) if block else None, []).append(bar)
    outside = layers.pop(None, [])
    groups = [(str(i), layers[i]) for i in sorted(layers)]
    groups += [("other", outside)] if outside else []
    bars = [b for _, group in groups for b in group]
    worst = max(bars, key=lambda b: b.value, default=None)
    words = f"largest: {worst.tip}".replace("\n", " ") if worst else "no tensors"
    return grouped_bars(
        f"{what} of {len(bars)} tensors in {len(groups)} groups; {words}.", groups,
        {f: s for f, s in _FAMILIES.items() if any(b.family == f for b in bars)},
        axis, "layer",
    )


def bits_figure(run: RunFiles) -> Markup:
    """Bits a weight of every matrix and table in the file."""

    def bits(t: dict[str, Any]) -> float | None:
        size, shape = number(t.get("bytes")), t.get("shape")
        sides = [number(side) for side in shape] if isinstance(shape, list) else [None]
        count = 0.0 if None in sides else math.prod(sides)
        return None if size is None or count < 1 else 8 * size / count

    return figure("Bits", _tensor_chart(run, "Bits", "bits", "bits a weight", bits),
                  "One bar a matrix or table, in the order of the artifact: its compressed codes "
                  "and steps, over its weights.", wide=True)


def error_figure(run: RunFiles) -> Markup:
    """What storing every matrix and table is expected to cost, or else its relative error."""

    def loss(t: dict[str, Any]) -> float | None:
        value = number(t.get("loss"))
        return None if value is None else 1e6 * value

    def error(t: dict[str, Any]) -> float | None:
        value = number(t.get("relative_error"))
        return None if value is None else 100 * value

    if any(loss(t) is not None for t in objects(run.result.get("tensors"))):
        chart = _tensor_chart(run, "Expected loss", "µnats", "millionths of a nat a token", loss)
        words = ("what its rounding is expected to add to the loss, by the inputs and gradients of "
                 "the calibration text.")
    else:
        chart = _tensor_chart(run, "Quantisation error", "%", "relative error, %", error)
        words = ("the norm of its change by storing it as a share of its own norm. Those near zero "
                 "are stored as float16.")
    return figure("Quantisation error", chart, f"One bar a matrix or table: {words}", wide=True)


def all_figures(run: RunFiles) -> Markup:
    """The charts in the order of the page."""
    return join(draw(run) for draw in
                (bpb_figure, loss_figure, schedule_figure, size_figure, bits_figure, error_figure))
