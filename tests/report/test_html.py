"""report.html: well-formed, loads nothing, injects nothing, and right where files say little."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from pgolf.config import to_dict
from pgolf.errors import DataError
from pgolf.recipes import get
from pgolf.report.html import write_report
from pgolf.report.lines import thinned
from pgolf.report.markup import Markup, tag

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
    """The page's drawings, each parsed as XML of its own."""
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, re.S)]
    numbers = re.compile(r"^-?\d+(\.\d+)?$")
    for chart in charts:
        assert chart.get("role") == "img" and chart.get("aria-label")
        for element in chart.iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"):
                assert numbers.match(element.get(key, "0")), (element.tag, key, element.get(key))
            assert "nan" not in element.get("d", "") and "inf" not in element.get("d", "")
    return charts


def render(run) -> tuple[str, Page, list[ElementTree.Element]]:
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob(".report*")), "left a temporary file"
    source = path.read_text(encoding="utf-8")
    page, charts = Page(source), charts_of(source)
    assert len(charts) == 7  # the schedule has two panels
    assert page.tags.count("h1") == 1 and page.tags.count("figure") == 6
    return source, page, charts


def by_class(chart: ElementTree.Element, tag_name: str, style: str) -> list[ElementTree.Element]:
    return [e for e in chart.iter(tag_name) if style in (e.get("class") or "").split()]


def test_page_shows_the_result(write_run, result, metrics):
    _, page, _ = render(write_run(result, metrics))
    for words in ("2.0200", "2.0000", "+1.00 %", "1,000 B", "3,000 B headroom", "123,456", "1m15s",
                  "20 steps, 81.9 k tokens", "3.0300", "wikipedia-leads-en", "640.2 ms/step",
                  "9,876 bytes, 4,321 tokens", "avx2, avx512f", "pgolf/score.py",
                  "different corpora cannot be compared", "blocks.1.mlp.fc.weight", "64 × 32",
                  "int6", "float16", "25.0 %", "3.000 %", "matrix_lr", "rope_base"):
        assert words in page.text, words
    assert "Over the budget" not in page.text


def test_it_loads_nothing_and_runs_nothing(write_run, result, metrics):
    source, page, _ = render(write_run(result, metrics))
    assert "http://" not in source and "https://" not in source
    loading = {"script", "link", "img", "image", "iframe", "object", "embed", "use", "a", "base"}
    assert not loading & set(page.tags)
    assert not re.search(r"url\(|@import", source)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "style")
                or a[1].startswith("on")]
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in source


def test_bpb_chart_has_the_curve_and_all_references(write_run, result, metrics):
    _, _, charts = render(write_run(result, metrics))
    bpb = charts[0]
    labels = [e.text for e in by_class(bpb, "text", "reference-label")]
    assert labels == ["decoded 2.0200", "live 2.0000", "xz -9 3.0300", "zstd -19 3.2000"]
    heights = [float(e.get("y")) for e in by_class(bpb, "text", "reference-label")]
    ordered = sorted(heights)
    # decoded and live nearly coincide; their labels do not.
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) >= 15 - 0.01
    lines = [float(e.get("y1")) for e in by_class(bpb, "line", "reference")]
    assert sorted(range(4), key=lambda i: lines[i]) == [3, 2, 0, 1]
    assert len(by_class(bpb, "circle", "dot")) == 4  # two on the line, two in tooltips
    tips = [e.text for e in bpb.iter("title")]
    assert "40,960 tokens\nvalidation 3.1000" in tips and "81,920 tokens\nvalidation 2.1000" in tips


def test_loss_chart_places_its_points_on_the_axes(write_run, result, metrics):
    _, _, charts = render(write_run(result, metrics))
    loss = charts[1]
    ticks = [e for e in loss.iter("text") if e.get("class") == "tick"]
    y_ticks = {float(e.text): float(e.get("y")) - 4 for e in ticks if e.get("text-anchor") == "end"}
    x_ticks = {e.text: float(e.get("x")) for e in ticks if e.get("text-anchor") == "middle"}
    assert list(y_ticks) == [3, 4, 5, 6, 7]
    assert list(x_ticks) == ["0", "20 k", "40 k", "60 k", "80 k"]
    train = by_class(loss, "path", "line")[0].get("d")
    points = [tuple(map(float, p.split())) for p in train[1:].split("L")]
    assert len(points) == 20
    for step, (x, y) in enumerate(points, start=1):
        scale = (x_ticks["80 k"] - x_ticks["0"]) / 80_000
        assert x == pytest.approx(x_ticks["0"] + 4096 * step * scale, abs=0.1)
        height = (7 - 0.175 * step - 3) / 4
        assert y == pytest.approx(y_ticks[3] + height * (y_ticks[7] - y_ticks[3]), abs=0.1)


def test_schedule_names_its_events(write_run, result, metrics):
    _, _, charts = render(write_run(result, metrics))
    assert [e.text for e in by_class(charts[2], "text", "event-label")] == ["late QAT on"]
    assert [len(by_class(c, "line", "event")) for c in charts] == [0, 0, 1, 1, 0, 0, 0]
    assert "late QAT on at 73.7 k tokens" in charts[2].get("aria-label")


def test_labels_of_many_events_do_not_overlap(write_run, result, metrics):
    events = [{"kind": "event", "tokens": 1000 * i, "text": f"event number {i}"} for i in range(40)]
    _, _, charts = render(write_run(result, metrics + events))
    rows: dict[str, list[tuple[float, float]]] = {}
    for e in by_class(charts[2], "text", "event-label"):
        at, width = float(e.get("x")), 6.8 * len(e.text)
        left = at - width if e.get("text-anchor") == "end" else at
        rows.setdefault(e.get("y"), []).append((left, left + width))
    assert 1 < len(rows) <= 4
    for spans in rows.values():
        assert all(a[1] < b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert len(by_class(charts[2], "line", "event")) == 41


def test_size_chart(write_run, result, metrics):
    _, _, charts = render(write_run(result, metrics))
    sizes = charts[4]
    values = [e.text for e in by_class(sizes, "text", "value")]
    assert values == ["500  ·  50.0 %", "300  ·  30.0 %", "80  ·  8.0 %", "20  ·  2.0 %",
                      "100  ·  10.0 %"]
    room, *bars = [float(e.get("width")) for e in sizes.iter("rect")]
    strip, rows = bars[:5], bars[5:]
    starts = [float(e.get("x")) for e in sizes.iter("rect")][1:6]
    for start, width, end in zip(starts, strip, starts[1:], strict=False):
        assert start + width == pytest.approx(end, abs=0.02)  # end to end
    assert sum(strip) == pytest.approx(room / 4, abs=0.1)  # 1,000 of 4,000 bytes
    assert rows[1] / rows[0] == pytest.approx(300 / 500, abs=1e-3)
    assert len(by_class(sizes, "line", "limit")) == 1
    _, _, charts = render(write_run(result | {"budget_bytes": 0}, metrics))
    assert not by_class(charts[4], "line", "limit")


def test_over_the_budget_is_said_first(write_run, result, metrics):
    source, page, _ = render(write_run(result | {"bytes_total": 4123}, metrics))
    assert "Over the budget by 123 bytes" in page.text and "123 B over" in page.text
    assert source.index("Over the budget") < source.index("2.0200</strong>")


def test_error_chart_groups_by_layer(write_run, result, metrics):
    _, _, charts = render(write_run(result, metrics))
    errors = charts[6]
    tips = [e.text for e in errors.iter("title")]
    assert len(tips) == 7  # bigram.scale is no matrix
    assert tips[0] == "blocks.0.attn.c_q.weight\n2.00 % as int6"
    bars = [[e for e in by_class(errors, "rect", s) if e.get("width") != "11"] for s in "abc"]
    assert [len(b) for b in bars] == [4, 2, 1]  # attention, MLP, other
    heights = [float(b.get("height")) for b in bars[0]]
    assert heights[2] / heights[0] == pytest.approx(1.5, abs=0.01)
    ticks = {e.text: float(e.get("y")) for e in errors.iter("text")
             if e.get("text-anchor") == "end" and e.text != "layer"}
    assert list(ticks) == ["0", "1", "2", "3"]
    assert heights[0] == pytest.approx(ticks["0"] - ticks["2"], abs=0.02)  # 2 %
    names = [e.text for e in errors.iter("text") if e.get("text-anchor") == "middle"]
    assert names == ["0", "1", "other"]


def test_bits_and_expected_losses_by_tensor(write_run, result, metrics):
    for i, t in enumerate(result["tensors"]):
        t |= {"bytes": 96 * (i + 1), "loss": 1e-6 * (i + 1) if t["kind"] == "int" else None}
    result["tensors"][0] |= {"shape": [16, 8]}
    _, _, charts = render(write_run(result, metrics))
    bits, losses = ([e.text for e in chart.iter("title")] for chart in charts[5:])
    assert bits[0] == "blocks.0.attn.c_q.weight\n6.00 bits as int6"
    assert losses[0] == "blocks.0.attn.c_q.weight\n1.00 µnats as int6"
    assert len(bits) == len(losses) == 7


def test_a_page_is_called_by_the_settings_of_the_run(write_run, result, metrics):
    run = write_run(result, metrics)
    (run / "config.json").write_text(json.dumps(to_dict(get("demo").config({"layers": 2}))))
    source, _, _ = render(run)
    assert "<h1>demo with 1 setting changed</h1>" in source and ">layers=2</p>" in source
    assert "<title>demo with 1 setting changed · " in source


def test_names_from_files_are_escaped(write_run, result, metrics):
    attack = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;</title></style>\x00\x1b\ud800"
    texts = {"recipe": attack, "corpus": attack, "seed": attack, "exported_weights": attack,
             "code_modules": [attack, [attack]], "provenance": {attack: attack, "commit": attack},
             "baselines": {attack: {"bpb": 2.5}}, "bytes_by_group": {attack: 5},
             "corpus_sha256": attack}
    result["tensors"] += [{"name": f"blocks.0.{attack}.weight", "group": attack, "kind": attack,
                           "bits": attack, "shape": [attack], "relative_error": 0.5}]
    metrics += [{"kind": "event", "tokens": 5, "text": attack}]
    run = write_run(result | texts, metrics)
    config = {attack: attack, "model": {attack: attack, "layers": attack}}
    (run / "config.json").write_text(json.dumps(config))
    _, page, charts = render(run)
    assert not {"script", "img"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] == "src"]
    assert "<script>alert(1)</script>" in page.text
    assert page.tags.count("title") == sum(len(list(c.iter("title"))) for c in charts) + 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_few_points(write_run, result, metrics, steps):
    few = [line for line in metrics if line["step"] <= steps]
    _, _, charts = render(write_run(result, few))
    lines = by_class(charts[1], "path", "line")
    assert len(lines) == (1 if steps else 0)
    # One dot on the line and one in its tooltip for every point.
    assert len(by_class(charts[1], "circle", "dot")) == 2 * steps
    if not steps:
        assert "no values" in "".join(charts[1].itertext())


def test_values_that_are_not_finite_leave_a_gap(write_run, result, metrics):
    bad = iter((math.nan, math.inf, -math.inf, None, "text", 10**400))
    for line in metrics:
        if line["kind"] == "train" and line["step"] in (5, 6, 12, 13, 14, 20):
            line["loss"] = next(bad)
    result |= {"val_bpb": math.nan, "val_loss": math.inf, "seed": math.nan}
    _, page, charts = render(write_run(result, metrics))
    assert "seed n/a" in page.text and "n/a nats per token" in page.text
    path = by_class(charts[1], "path", "line")[0].get("d")
    assert [len(run.split("L")) for run in path[1:].split("M")] == [4, 5, 5]
    assert "decoded" not in "".join(charts[0].itertext())


@pytest.mark.parametrize("value", [None, "text", 3, [], {}, [None, 3, "x", []]])
def test_results_that_say_little(write_run, result, metrics, value):
    render(write_run(dict.fromkeys(result, value), metrics))
    render(write_run({}, []))


def test_no_validation_no_baselines_no_tensors(write_run, result, metrics):
    train = [line for line in metrics if line["kind"] == "train"]
    bare = result | {"baselines": {}, "tensors": [], "val_bpb_live": None}
    _, page, charts = render(write_run(bare, train))
    assert [e.text for e in by_class(charts[0], "text", "reference-label")] == ["decoded 2.0200"]
    assert "validation: no values" in charts[1].get("aria-label")
    assert "0 in the artifact" in page.text


def test_extreme_values_stay_in_the_drawing(write_run, result, metrics):
    for line in metrics:
        line["loss"] = (-1) ** line["step"] * 1e299
        line["tokens"] = line["step"] * 1e298
    _, _, charts = render(write_run(result, metrics))
    for circle in charts[1].iter("circle"):
        assert 0 <= float(circle.get("cx")) <= 560 and 0 <= float(circle.get("cy")) <= 300


def test_long_runs_make_a_page_of_bounded_size(write_run, result):
    def train(count):
        return [{"kind": "train", "step": i, "tokens": 4096 * i, "loss": 3 + (i * 7919 % 100) / 100,
                 "lr_scale": 0.5, "momentum": 0.9} for i in range(count)]

    medium = len(render(write_run(result, train(1000)))[0])
    assert len(render(write_run(result, train(20_000)))[0]) < 1.5 * medium


def test_thinning_keeps_spikes_gaps_and_order():
    points = [(float(i), 1.0) for i in range(5000)]
    points[1234], points[4000], points[77] = (1234.0, 99.0), (4000.0, None), (77.0, -5.0)
    kept = thinned(points, 300)
    assert len(kept) <= 300 and kept == sorted(kept, key=lambda p: p[0])
    assert {points[1234], points[4000], points[77]} <= set(kept) <= set(points)
    assert thinned(points[:300], 300) == points[:300]


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_missing_file_is_named(write_run, result, metrics, name):
    run = write_run(result, metrics)
    (run / name).unlink()
    with pytest.raises(DataError, match=rf"run holds no {re.escape(name)}: give the folder"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage", [b'{"kind": "train", "ste', b"\xff\xfe{}", b"[1, 2]", b"7", b"[" * 100_000])
def test_a_damaged_line_is_named(write_run, result, metrics, damage):
    run = write_run(result, metrics)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[6:6] = [b"", damage]  # empty lines count, as in an editor
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 8 is damaged"):
        write_report(run)
    (run / "result.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"result\.json is damaged"):
        write_report(run)


def test_kinds_of_later_versions_are_passed_over(write_run, result, metrics):
    render(write_run(result, [{"kind": "memory", "peak": 3}, {"peak": 3}, *metrics]))


def test_only_markup_is_passed_on():
    assert tag("p", "a<b", Markup("<br>"), class_='"x"', hidden=None, data_x=1.50) == (
        '<p class="&quot;x&quot;" data-x="1.5">a&lt;b<br></p>')
    assert tag("p", title=Markup('"')) == '<p title="&quot;"></p>'
