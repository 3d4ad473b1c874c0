"""A plot of each operator over its sizes, from the lines of `bench ops`."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.schema import Timing
from pgolf.errors import PgolfError
from pgolf.extras import matplotlib
from pgolf.files import atomic_write
from pgolf.report.page_style import LIGHT
from pgolf.report.plots import log_ticks, new, style


def files(path: Path | None, operators: Sequence[str]) -> dict[str, Path]:
    """Operator -> file of its plot, for `path`, a folder or NAME.png; {} for None.

    Raises:
        PgolfError: one file for several operators, or matplotlib does not load.
    """
    if path is None:
        return {}
    matplotlib()  # before anything is timed
    if path.suffix != ".png":
        return {name: path / f"{name}.png" for name in operators}
    if len(operators) > 1:
        raise PgolfError(
            f"--plot {path} is one file for {len(operators)} operators: name a folder, or one --op"
        )
    return {operators[0]: path}


def draw(lines: Sequence[Timing], path: Path) -> None:
    """Write a PNG: a row of panels a dtype, a panel a mode, points the medians of a provider.

    Each has its value; whiskers reach from the 20th to the 80th percentile; the line across is the
    floor.
    """
    dtypes = list(dict.fromkeys(line.dtype for line in lines))
    modes = list(dict.fromkeys(line.mode for line in lines))
    providers = dict.fromkeys(line.provider for line in lines)
    providers = dict(zip(providers, itertools.cycle("abcdef"), strict=False))
    with style():
        figure = new(260.0 * len(dtypes) + 60, 345.0 * len(modes))
        panels = figure.subplots(len(dtypes), len(modes), squeeze=False)
        for row, dtype in zip(panels, dtypes, strict=True):
            for panel, mode in zip(row, modes, strict=True):
                part = [line for line in lines if line.dtype == dtype and line.mode == mode]
                if part:
                    _draw_panel(panel, part, providers)
                panel.set_title(f"{mode}, {dtype}: ms")
        first = lines[0]
        caches = "cold" if first.cold else "warm"
        title = f"{first.operator}: {first.device}, {first.threads} threads, {caches} caches"
        figure.suptitle(textwrap.fill(title, 44 * len(modes)))
        atomic_write(path, lambda file: figure.savefig(
            file, format="png", dpi=120, facecolor=LIGHT["card"]))


def _draw_panel(panel: Any, lines: Sequence[Timing], providers: dict[str, str]) -> None:
    """One mode and dtype; `providers` are name -> colour, the same in each panel."""
    samples = list(dict.fromkeys(line.sample for line in lines))
    for i, (name, colour) in enumerate(providers.items()):
        own = [line for line in lines if line.provider == name]
        beside = 0.8 * (i + 0.5) / len(providers) - 0.4  # whiskers that do not hide each other
        medians = [line.median_ms for line in own]
        spread = [
            [line.median_ms - line.p20_ms for line in own],
            [line.p80_ms - line.median_ms for line in own],
        ]
        where = [samples.index(line.sample) + beside for line in own]
        panel.errorbar(where, medians, yerr=spread, label=name, color=LIGHT[colour], fmt="o",
                       capsize=3)
        for x, line in zip(where, own, strict=True):
            panel.annotate(f"{line.median_ms:.3g}", (x, line.p80_ms), (0, 5), rotation=90,
                           textcoords="offset points", ha="center", va="bottom", fontsize=9)
    floors = {line.sample: line.floor_ms for line in lines}
    for i, sample in enumerate(samples):
        panel.hlines(
            floors[sample], i - 0.45, i + 0.45, colors=LIGHT["ink"], linestyles="dashed",
            label=None if i else "floor",
        )  # fmt: skip
    log_ticks(panel)
    panel.grid(axis="y")
    panel.set_xlim(-0.5, len(samples) - 0.5)
    width = max(48 // len(samples), 6)
    panel.set_xticks(range(len(samples)), [textwrap.fill(sample, width) for sample in samples])
    panel.legend(fontsize=9)
