"""A plot of each operator over its sizes, from the lines of `bench ops`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.schema import Timing
from pgolf.errors import PgolfError
from pgolf.files import atomic_write


def files(path: Path | None, operators: Sequence[str]) -> dict[str, Path]:
    """Operator -> file of its plot, for `path`, a folder or NAME.png; {} for None.

    Raises:
        PgolfError: one file for several operators, or matplotlib is not installed.
    """
    if path is None:
        return {}
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PgolfError("--plot needs matplotlib: pip install matplotlib") from None
    if path.suffix != ".png":
        return {name: path / f"{name}.png" for name in operators}
    if len(operators) > 1:
        raise PgolfError(
            f"--plot {path} is one file for {len(operators)} operators: name a folder, or one --op"
        )
    return {operators[0]: path}


def draw(lines: Sequence[Timing], path: Path) -> None:
    """Write a PNG: a row of panels a dtype, a panel a mode, points the medians of a provider.

    Whiskers reach from the 20th to the 80th percentile; the line across is the floor.
    """
    # Not pyplot, which keeps figures and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(line.dtype for line in lines))
    modes = list(dict.fromkeys(line.mode for line in lines))
    figure = Figure(figsize=(4.8 * len(modes), 3.6 * len(dtypes) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(dtypes), len(modes), squeeze=False)
    for row, dtype in zip(panels, dtypes, strict=True):
        for panel, mode in zip(row, modes, strict=True):
            part = [line for line in lines if line.dtype == dtype and line.mode == mode]
            if part:
                _draw_panel(panel, part)
            panel.set_title(f"{mode}, {dtype}")
    first = lines[0]
    caches = "cold" if first.cold else "warm"
    figure.suptitle(f"{first.operator}: {first.device}, {first.threads} threads, {caches} caches")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _draw_panel(panel: Any, lines: Sequence[Timing]) -> None:
    samples = list(dict.fromkeys(line.sample for line in lines))
    names = list(dict.fromkeys(line.provider for line in lines))
    for i, name in enumerate(names):
        own = [line for line in lines if line.provider == name]
        beside = 0.4 * (i + 0.5) / len(names) - 0.2  # whiskers that do not hide each other
        medians = [line.median_ms for line in own]
        spread = [
            [line.median_ms - line.p20_ms for line in own],
            [line.p80_ms - line.median_ms for line in own],
        ]
        where = [samples.index(line.sample) + beside for line in own]
        panel.errorbar(where, medians, yerr=spread, label=name, marker="o", capsize=3)
    floors = {line.sample: line.floor_ms for line in lines}
    for i, sample in enumerate(samples):
        panel.hlines(
            floors[sample], i - 0.3, i + 0.3, colors="black", linestyles="dashed",
            label=None if i else "floor",
        )  # fmt: skip
    panel.set_yscale("log")
    panel.set_ylabel("ms")
    panel.set_xlim(-0.5, len(samples) - 0.5)
    panel.set_xticks(range(len(samples)), samples)
    panel.legend(fontsize="small")
