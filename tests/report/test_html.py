"""report.html: one file, loads nothing, injects nothing, and is right where files say little."""

import json
import math
import re
import runpy
import sys
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pgolf.config import to_dict
from pgolf.errors import DataError
from pgolf.recipes import get
from pgolf.report import figures
from pgolf.report.html import report_line, write_report
from pgolf.report.markup import Markup, tag
from pgolf.report.page_style import DARK, LIGHT, STYLE
from pgolf.report.plots import style
from pgolf.report.read import read_run

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects elements, attributes and text, and checks that every element is closed."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def charts_of(source: str) -> list[ElementTree.Element]:
    """The drawings, each parsed as XML of its own."""
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, re.S)]
    for chart in charts:
        assert chart.get("role") == "img" and chart.get("aria-label")
        for element in chart.iter():
            for key, value in element.attrib.items():
                assert key == "aria-label" or not re.search(r"\b(nan|inf)\b", value), (key, value)
    return charts


def render(run) -> tuple[str, Page, list[ElementTree.Element]]:
    path = write_report(run)
    assert [p for p in run.iterdir() if p.name.startswith((".", "report"))] == [path]
    source = path.read_text(encoding="utf-8")
    page, charts = Page(source), charts_of(source)
    assert page.tags.count("h1") == 1 and page.tags.count("figure") == len(charts) == 6
    return source, page, charts


@pytest.fixture
def draw(write_run):
    """One figure of a run, by its name: (SVG, texts in it)."""

    def call(name: str, result, metrics) -> tuple[ElementTree.Element, list[str]]:
        with style():
            markup = getattr(figures, f"{name}_figure")(read_run(write_run(result, metrics)))
        chart, = charts_of(markup)
        return chart, [text.text for text in chart.iter("text")]

    return call


def tips(chart: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    """Tooltip -> corners of what it is of."""
    return {g.find("title").text: corners(g.find("path")) for g in chart.iter("g")}


def corners(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split()))
            for pair in re.findall(r"[ML] (\S+ \S+)", path.get("d"))]


def lines(chart: ElementTree.Element, colour: str) -> list[ElementTree.Element]:
    start = f"fill: none; stroke: var(--{colour}); stroke-width: 2"
    return [p for p in chart.iter("path") if p.get("style").startswith(start)]


def test_the_page_shows_the_result_in_one_file_of_its_own(write_run, result, metrics):
    source, page, charts = render(write_run(result, metrics))
    for text in ("2.0200", "2.0000", "+1.00 %", "1,000 B", "3,000 B headroom", "123,456", "1m15s",
                  "20 steps, 81.9 k tokens", "3.0300", "wikipedia-leads-en", "640.2 ms/step",
                  "9,876 bytes, 4,321 tokens", "avx2, avx512f", "pgolf/score.py",
                  "different corpora cannot be compared", "blocks.1.mlp.fc.weight", "64 × 32",
                  "int6", "float16", "25.0 %", "3.000 %", "matrix_lr", "rope_base"):
        assert text in page.text, text
    assert "Over the budget" not in page.text
    # It loads nothing and runs nothing.
    assert not re.search(r"https?:|url\(|@import", source)
    loading = {"script", "link", "img", "image", "iframe", "object", "embed", "a", "base"}
    assert not loading & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "xlink:href") or a[1][:2] == "on"]
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    ids = [value for _, key, value in page.attributes if key == "id"]
    links = {value for _, key, value in page.attributes if key == "href"}
    assert len(ids) == len(set(ids)) and links == {f"#{i}" for i in ids}
    # Drawings scale with it and follow its theme and font.
    assert "svg { display: block; width: 100%;" in STYLE and "min-width" not in STYLE
    assert "prefers-color-scheme: dark" in STYLE and LIGHT.keys() == DARK.keys()
    for chart in charts:
        assert chart.get("viewBox").startswith("0 0 440 ") and not chart.get("width")
        assert list(chart.iter("text"))
        for element in chart.iter():
            text = element.get("style", "")
            used = re.findall(r"(?:fill|stroke): (?!none)([^;]*)", text)
            assert all(c[6:-1] in LIGHT and c == f"var(--{c[6:-1]})" for c in used), text
            assert "font-family" not in text
            if element.tag in ("path", "text", "use"):
                assert re.search("fill|stroke", text), "black in both themes"


def test_a_figure_is_the_same_again_whatever_the_settings_of_the_caller(draw, result, metrics):
    import matplotlib

    first = ElementTree.tostring(draw("loss", result, metrics)[0])
    theirs = {"font.size": 30, "axes.titlepad": 30, "svg.fonttype": "path", "svg.hashsalt": "x"}
    with matplotlib.rc_context(theirs):
        assert ElementTree.tostring(draw("loss", result, metrics)[0]) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_scores_are_named_lines_that_are_apart(draw, result, metrics):
    chart, _ = draw("bpb", result, metrics)
    names = ["decoded 2.0200", "live 2.0000", "xz -9 3.0300", "zstd -19 3.2000"]
    at = {t.text: float(t.get("y")) for t in chart.iter("text") if t.text in names}
    assert sorted(at, key=at.get) == [names[3], names[2], names[0], names[1]]
    heights = sorted(at.values())
    assert min(b - a for a, b in pairwise(heights)) >= 13  # more than the height of the text
    assert all(name in chart.get("aria-label") for name in names)
    assert {"40,960 tokens\nvalidation 3.1000", "81,920 tokens\nvalidation 2.1000"} == set(
        tips(chart))


def test_losses_are_at_their_place_on_the_axes(draw, result, metrics):
    chart, texts = draw("loss", result, metrics)
    assert {"nats per token", "training", "validation", "tokens, to 81.9 k"} <= set(texts)
    at = {t.text: (float(t.get("x")), float(t.get("y"))) for t in chart.iter("text")}
    points = corners(lines(chart, "a")[0])
    assert len(points) == 20
    x_scale = (at["80 k"][0] - at["0"][0]) / 80_000
    y_scale = at["7"][1] - at["6"][1]
    for (a, b), step in zip(pairwise(points), range(1, 20), strict=True):
        assert a[0] == pytest.approx(at["0"][0] + 4096 * step * x_scale, abs=0.1)
        assert b[1] - a[1] == pytest.approx(-0.175 * y_scale, abs=0.1)


def test_events_are_numbered_where_they_are(draw, result, metrics):
    events = [{"kind": "event", "tokens": 1000 * i, "text": f"event {i}"} for i in range(9)]
    chart, texts = draw("schedule", result, metrics + events)
    assert {"1–5", "6–9", "10"} <= set(texts)
    assert "event 1 at 1.00 k tokens" in chart.get("aria-label")
    assert "late QAT on at 73.7 k tokens" in chart.get("aria-label")


def test_sizes_are_named_bars(draw, result, metrics):
    chart, texts = draw("size", result, metrics)
    values = ["500  ·  50.0 %", "300  ·  30.0 %", "80  ·  8.0 %", "20  ·  2.0 %", "100  ·  10.0 %"]
    names = ["attention", "MLP", "token table", "header", "code"]
    assert {*names, *values, "1,000 bytes of a budget of 4,000"} <= set(texts)
    bars = tips(chart)
    widths = {tip: bar[1][0] - bar[0][0] for tip, bar in bars.items()}
    assert widths["MLP: 300 bytes"] / widths["attention: 500 bytes"] == pytest.approx(0.6, abs=0.01)
    _, texts = draw("size", result | {"budget_bytes": 0}, metrics)
    assert "1,000 bytes" in texts


@pytest.mark.parametrize("name", ["bits", "error"])
def test_every_tensor_is_a_bar_with_a_name(draw, result, metrics, name):
    for i, t in enumerate(result["tensors"]):
        t["bytes"] = 96 * (i + 1)
    chart, texts = draw(name, result, metrics)
    assert {"attn.c_q", "attn.proj", "mlp.fc", "tok_emb"} <= set(texts)
    assert texts.count("0") >= 3 and texts.count("1") >= 3  # layers under each bar
    bars = tips(chart)
    assert len(bars) == 7  # bigram.scale is no matrix
    unit = "0.38 bits" if name == "bits" else "2.00 %"
    assert f"blocks.0.attn.c_q.weight\n{unit} as int6" in bars
    first, second = (next(max(y for _, y in bar) - min(y for _, y in bar)
                     for tip, bar in bars.items() if f".{layer}.attn.c_q" in tip)
                     for layer in (0, 1))
    assert second / first == pytest.approx(4 if name == "bits" else 1.5, abs=0.05)


def test_expected_losses_take_the_place_of_errors(draw, result, metrics):
    for i, t in enumerate(result["tensors"]):
        t["loss"] = 1e-6 * (i + 1) if t["kind"] == "int" else None
    chart, _ = draw("error", result, metrics)
    assert "blocks.0.attn.c_q.weight\n1.00 µnats as int6" in tips(chart)


def test_a_run_is_headed_by_the_settings_that_differ(write_run, result):
    run = write_run(result | {"bytes_total": 4123}, [])
    config = get("demo").config({"layers": 2, "unet_skips": False, "out": "elsewhere"})
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    source, page, _ = render(run)
    assert "<h1>demo with 2 settings changed</h1>" in source
    assert "<title>demo with 2 settings changed · " in source
    assert "layers=2 not 4 unet_skips=false not true seed 1337" in page.text
    assert "Over the budget by 123 bytes" in page.text and "123 B over" in page.text
    assert source.index("Over the budget") < source.index("2.0200</strong>")


def test_names_from_files_are_escaped(write_run, result, metrics):
    attack = ("\x00\x1b\ud800$\\frac{x$_<script>alert(1)</script>\"'><img src=x onerror=y>&amp;"
              "</title></style>-->]]>\n#d55e00")
    texts = {"recipe": attack, "corpus": attack, "seed": attack, "exported_weights": attack,
             "code_modules": [attack, [attack]], "provenance": {attack: attack, "commit": attack},
             "baselines": {attack: {"bpb": 2.5}}, "bytes_by_group": {attack: 5},
             "corpus_sha256": attack}
    result["tensors"] += [{"name": f"{place}{attack}.weight", "group": attack, "kind": attack,
                           "bits": attack, "shape": [attack], "relative_error": 0.5}
                          for place in ("blocks.0.", "")]
    metrics += [{"kind": "event", "tokens": 5, "text": attack}]
    run = write_run(result | texts, metrics)
    config = {attack: attack, "model": {attack: attack, "layers": attack}}
    (run / "config.json").write_text(json.dumps(config))
    _, page, charts = render(run)
    assert not {"script", "img"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] == "src"]
    assert "<script>alert(1)</script>" in page.text
    assert page.tags.count("title") == sum(len(list(c.iter("title"))) for c in charts) + 1
    shown = {text.text for chart in (charts[0], charts[3], charts[5]) for text in chart.iter("text")
             if "\ufffd$\\frac{x$_<" in (text.text or "")}
    assert len(shown) == 3  # as reference, and as a part of different lengths


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_few_points_are_dots(draw, result, metrics, steps):
    chart, texts = draw("loss", result, [line for line in metrics if line["step"] <= steps])
    dots = [u for u in chart.iter("use") if "fill: var(--a)" in u.get("style")]
    assert len(dots) == steps + 1  # one in the legend
    assert ("no values" in texts) == (not steps)


def test_values_that_are_not_finite_leave_a_gap(draw, result, metrics):
    bad = iter((math.nan, math.inf, -math.inf, None, "text", 10**400))
    for line in metrics:
        if line["kind"] == "train" and line["step"] in (5, 6, 12, 13, 14, 20):
            line["loss"] = next(bad)
    chart, _ = draw("loss", result, metrics)
    runs = lines(chart, "a")[0].get("d").split("M")[1:]
    assert [len(run.split("L")) for run in runs] == [4, 5, 5]
    _, texts = draw("bpb", result | {"val_bpb": math.nan}, metrics)
    assert "live 2.0000" in texts and not [t for t in texts if "decoded" in t]


def test_results_that_say_little(write_run, result, monkeypatch):
    run = write_run(dict.fromkeys(result, math.nan), [{"peak": 3}, {"kind": "later"}])
    _, page, _ = render(run)
    assert "no sizes" in page.text and "no tensors" in page.text and "no values" in page.text
    assert "seed n/a" in page.text and "n/a nats per token" in page.text
    # Lines over tokens, which take longer, have little of it.
    for name in ("bpb", "loss", "schedule"):
        monkeypatch.setattr(figures, f"{name}_figure", lambda run: "")
    for value in (None, "text", 3, [], {}, [None, 3, "x", []]):
        (run / "result.json").write_text(json.dumps(dict.fromkeys(result, value)))
        Page(write_report(run).read_text())


def test_extreme_values_stay_in_the_drawing(draw, result, metrics):
    for line in metrics:
        line["loss"] = (-1) ** line["step"] * 1e299
        line["tokens"] = line["step"] * 1e298
    chart, _ = draw("loss", result, metrics)
    points = corners(lines(chart, "a")[0])
    assert len(points) == 20 and all(0 <= x <= 440 and 0 <= y <= 250 for x, y in points)


def test_long_runs_make_a_page_of_bounded_size(draw, result):
    @cache
    def size(count):
        train = [{"kind": "train", "tokens": 4096 * i, "loss": 3 + (i * 7919 % 100) / 100}
                 for i in range(count)]
        return len(ElementTree.tostring(draw("loss", result, train)[0]))

    assert size(20_000) < 1.5 * size(1000)
    points = [(float(i), 1.0) for i in range(5000)]
    points[1234], points[4000], points[77] = (1234.0, 99.0), (4000.0, None), (77.0, -5.0)
    kept = figures.thinned(points, 300)
    assert len(kept) <= 300 and kept == sorted(kept, key=lambda p: p[0])
    assert {points[1234], points[4000], points[77]} <= set(kept) <= set(points)
    assert figures.thinned(points[:300], 300) == points[:300]


def test_without_matplotlib_a_run_ends_with_one_line(write_run, result, metrics, monkeypatch):
    run = write_run(result, metrics)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = report_line(run)
    assert re.fullmatch(r"no report.html: .*: pip install --upgrade matplotlib, "
                        rf"then python -m pgolf.report {run}", line)
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    with pytest.raises(SystemExit, match="error: figures need the library matplotlib"):
        runpy.run_module("pgolf.report", run_name="__main__")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_missing_file_is_named(write_run, result, metrics, name):
    run = write_run(result, metrics)
    (run / name).unlink()
    with pytest.raises(DataError, match=rf"run holds no {re.escape(name)}: give the folder"):
        write_report(run)
    assert not (run / "report.html").exists()
    with pytest.raises(DataError, match="there is no such folder"):
        write_report(run / "nowhere")


@pytest.mark.parametrize(
    "damage", [b'{"kind": "train", "ste', b"\xff\xfe{}", b"[1, 2]", b"7", b"[" * 100_000])
def test_a_damaged_line_is_named(write_run, result, metrics, damage):
    run = write_run(result, metrics)
    rows = (run / "metrics.jsonl").read_bytes().splitlines()
    rows[6:6] = [b"", damage]  # empty lines count, as in an editor
    (run / "metrics.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 8 is damaged"):
        write_report(run)
    (run / "result.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"result\.json is damaged"):
        write_report(run)


def test_only_markup_is_passed_on():
    assert tag("p", "a<b", Markup("<br>"), class_='"x"', hidden=None, data_x=1.50) == (
        '<p class="&quot;x&quot;" data-x="1.5">a&lt;b<br></p>')
    assert tag("p", title=Markup('"')) == '<p title="&quot;"></p>'
