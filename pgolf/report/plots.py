"""What all figures share: matplotlib, inlined into the page as SVG.

Figures have the colours of the page's light theme; `inline` turns them into CSS variables, so that
they follow the dark theme, too. Sizes are in the units of the viewBox, which are points to
matplotlib. Everything coloured also has its name beside it: colour alone never carries the meaning.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from pgolf.extras import matplotlib
from pgolf.report.markup import Markup, join, printable, tag
from pgolf.report.page_style import LIGHT

WIDTH = 440.0
_TEXT = 12.0
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
# What matplotlib adds for readers of files of their own; clips, as no figure draws over its axes.
_LEFT_OUT = ("metadata", "style", "clipPath")


@contextmanager
def style() -> Iterator[None]:
    """Draw with matplotlib's defaults and these; the caller's settings are back afterwards.

    Raises:
        ConfigError: matplotlib does not load.
    """
    library = matplotlib()
    with warnings.catch_warnings(), library.rc_context():
        warnings.simplefilter("ignore")  # of a glyph without a width, and of crowded layouts
        library.rcdefaults()
        library.rcParams.update({
            "text.parse_math": False, "axes.unicode_minus": True, "axes.formatter.useoffset": False,
            "font.size": _TEXT, "axes.titlesize": _TEXT, "axes.titlelocation": "left",
            "xtick.labelsize": _TEXT - 1, "ytick.labelsize": _TEXT - 1, "legend.fontsize": _TEXT,
            "text.color": LIGHT["ink"], "axes.titlecolor": LIGHT["soft"],
            "axes.labelcolor": LIGHT["soft"], "xtick.color": LIGHT["soft"],
            "ytick.color": LIGHT["soft"], "axes.edgecolor": LIGHT["soft"],
            "grid.color": LIGHT["hair"], "grid.linewidth": 1.0, "axes.axisbelow": True,
            "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
            "xtick.bottom": False, "ytick.left": False, "ytick.minor.left": False,
            "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
            "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0.0, "axes.ymargin": 0.0,
            "lines.solid_capstyle": "round", "lines.markersize": 4.5, "legend.frameon": False,
            "svg.fonttype": "none",
        })  # fmt: skip
        yield


def new(height: float, width: float = WIDTH) -> Any:
    """A matplotlib Figure, not pyplot's, which keeps figures and asks for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def short(text: Any, limit: int = 32) -> str:
    """At most `limit` characters on one line, of those that can be drawn."""
    text = " ".join(printable(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def in_units(end: float) -> Callable[[float, Any], str]:
    """How the ticks of an axis that ends at `end` are written: 250 k, or 0.25 M on a longer one."""
    unit, scale = next((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
                       if end >= s or not u)
    return lambda value, _=None: f"{value / scale:.6g} {unit}".strip() if value else "0"


def log_ticks(axes: Any) -> None:
    """A logarithmic y axis with some labelled ticks, however little of a decade it shows."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axes.dataLim.intervaly
    low, high = low / 1.3, high * 1.6  # space for text above the highest
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    locator = LogLocator(subs=(1, 2, 5))
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
        locator = MaxNLocator(5)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")


def spread(positions: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Positions near the given ones, in the same order, `gap` apart if they fit."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [0.0] * len(positions)
    floor = lowest
    for i in order:
        placed[i] = floor = max(positions[i], floor)
        floor += gap
    ceiling = highest
    for i in reversed(order):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed


def _style(css: str) -> str:
    """An element's style in the page's colours and font."""
    kept = [w for w in css.split("; ") if not w.startswith("font-family")]
    return re.sub(r"#[0-9a-f]{6}", lambda m: _VARIABLES[m[0]], "; ".join(kept))


def _attribute(name: str, value: str) -> str:
    """An attribute's value; coordinates are rounded to 0.01."""
    if name == "style":
        return _style(value)
    value = " ".join(value.split())
    if name in ("id", "href"):
        return value
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)


def _element(element: ElementTree.Element, tips: Mapping[str, str]) -> Markup:
    name = element.tag.rpartition("}")[2]
    inside = join(_element(child, tips) for child in element)
    tip = tips.get(element.get("id", ""))
    if tip is not None:
        return tag("g", tag("title", tip), inside, class_=element.get("id", "").split()[0])
    if name in _LEFT_OUT or name in ("g", "defs") and not inside:
        return Markup()
    if name == "g" and not element.get("transform"):
        return inside
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    attributes.pop("clip-path", None)
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if attributes.get("style") == "fill: none":  # the ground of the figure and of its axes
        return Markup()
    return tag(name, (element.text or "").strip(), inside,
               **{key: _attribute(key, value) for key, value in attributes.items()})


def inline(figure: Any, name: str, label: str, tips: Mapping[str, str]) -> Markup:
    """A figure as an element of the page that grows and shrinks with it.

    Args:
        name: of the figure; differs from those of the others on the page.
        label: the whole figure as text, for screen readers.
        tips: gid of an artist, `CLASS NUMBER` -> what its tooltip says.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn = io.BytesIO()
    with matplotlib().rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(drawn)  # savefig would draw everything twice
    root = ElementTree.fromstring(drawn.getvalue())
    return tag("svg", *(_element(child, tips) for child in root),
               viewBox=root.get("viewBox"), role="img", aria_label=label)
