"""The console table: exact numbers, at most 80 columns, and no more than text."""

import math

import pytest

from pgolf.report.format import decimal, percent, si
from pgolf.report.table import result_table


def rows_of(table: str) -> dict[str, list[str]]:
    """Label -> the words behind it, for the indented rows."""
    rows = {}
    for line in table.splitlines():
        if line.startswith("  "):
            label, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
            rows[label] = cells
    return rows


def test_numbers(result):
    assert rows_of(result_table(result)) == {
        "decoded artifact": ["2.0200"],
        "live weights": ["2.0000"],
        "lost in quantisation": ["+1.00 %"],
        "xz -9, same bytes": ["3.0300", "x 1.50"],
        "zstd -19, same bytes": ["3.2000", "x 1.58"],
        "attention": ["500", "50.0 %"],
        "MLP": ["300", "30.0 %"],
        "token table": ["80", "8.0 %"],
        "header": ["20", "2.0 %"],
        "code": ["100", "10.0 %"],
        "total": ["1,000", "100.0 %"],
        "budget": ["4,000"],
        "headroom": ["3,000", "75.0 %"],
        "parameters": ["123,456"],
        "steps": ["20"],
        "tokens": ["81,920"],
        "training time": ["1m15s"],
        "ms/step": ["640.2"],
        "tokens/s": ["1,092"],
    }


def test_phases(result):
    """Those that took time, and what each counts against."""
    off = {"on_clock": False, "limit": None, "limit_seconds": None}
    result["phases"] = {
        "compile": off | {"seconds": 0.0},
        "warm_up": off | {"seconds": 1.25},
        "training": off | {"seconds": 75.0, "on_clock": True},
        "scoring": off | {"seconds": 30.04, "limit": "evaluation", "limit_seconds": 600.0},
        "total": off | {"seconds": 1106.29},
        "damaged": 7,
    }
    table = result_table(result)
    rows = rows_of(table[table.index("time, and what limits it") :])
    assert rows == {
        "warm up": ["1.2 s"],
        "training": ["75.0 s", "on the clock"],
        "scoring": ["30.0 s", "of 600 s"],
        "total": ["1,106.3 s"],
    }


def test_scope_and_footnote(result):
    table = " ".join(result_table(result).split())
    assert table.startswith("demo, seed 1337, on wikipedia-leads-en")
    assert "9,876 held-out bytes, 4,321 tokens, stride 64, context 256." in table
    assert "different corpora cannot be compared" in table


def test_over_budget_and_no_budget(result):
    over = rows_of(result_table(result | {"bytes_total": 4001}))
    assert over["OVER THE BUDGET BY"] == ["1", "0.0 %"] and "headroom" not in over
    assert rows_of(result_table(result | {"bytes_total": 4000}))["headroom"] == ["0", "0.0 %"]
    free = rows_of(result_table(result | {"budget_bytes": 0}))
    assert free["budget"] == ["none"] and "headroom" not in free


def test_columns_line_up(result):
    lines = [line for line in result_table(result).splitlines() if line.startswith("  ")]
    assert len({line.index(cell) + len(cell) for line in lines for cell in [line.split("  ")[-1]]
                if cell.endswith("%") and "+" not in cell}) == 1
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True, [1], 10**400])
def test_what_is_no_number_is_na(result, value):
    table = rows_of(result_table(dict.fromkeys(result, value)))
    assert table["decoded artifact"] == table["lost in quantisation"] == ["n/a"]
    assert table["total"] == table["steps"] == table["training time"] == ["n/a"]


def test_no_live_score(result):
    table = rows_of(result_table(result | {"val_bpb_live": None}))
    assert table["decoded artifact"] == ["2.0200"]
    assert table["live weights"] == table["lost in quantisation"] == ["n/a"]


def test_hostile_and_long_names_stay_inside_80_columns(result):
    name = "\x1b[2J\r\n" + "very long name " * 20
    table = result_table(result | {
        "recipe": name, "corpus": name, "bytes_by_group": {name: 10**14},
        "baselines": {name: {"bpb": 1e12}}, "tokens": 1e200, "train_seconds": 1e9,
    })
    assert max(map(len, table.splitlines())) <= 80
    assert all(c.isprintable() or c == "\n" for c in table)
    assert result_table({}).endswith("\n")


def test_words():
    assert [si(x) for x in (0, 999, 1000, 8192, 737280, 999_500, 5.51e9)] == [
        "0", "999", "1.00 k", "8.19 k", "737 k", "1.00 M", "5.51 B"]
    assert decimal(1234567.891, 1) == "1,234,567.9"
    assert decimal(1e300, 2) == "n/a" and decimal(1e20, 2) == "1.000e+20"
    assert percent(-0.005, 1) == "-0.5 %" and percent(0.005, 1, sign=True) == "+0.5 %"
