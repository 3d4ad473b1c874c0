"""`python -m bench decode` on a tiny recipe."""

import json
from dataclasses import asdict

import pytest

from bench import decode, schema

TINY = ["layers=2", "dim=32", "mlp_hidden=32", "rope_dims=8", "bigram_buckets=0", "batch_tokens=64"]


def test_a_line_of_figures(tmp_path, capsys) -> None:
    out = tmp_path / "decode.jsonl"
    options = ["--micro", "3x16", "--rounds", "3", "--device", "cpu", "--json", str(out)]
    assert decode.main(["demo", *TINY, "stride=16", *options]) == 0
    line = schema.DecodeTiming(**json.loads(out.read_text()))
    assert (line.recipe, line.sequences, line.tokens, line.rounds) == ("demo", 3, 16, 3)
    assert line.cached_tokens_per_second == pytest.approx(3e3 / line.cached_ms)
    assert line.whole_tokens_per_second == pytest.approx(1e3 / line.whole_ms)
    assert all(value is not None for value in asdict(line).values())
    output = capsys.readouterr().out
    assert f"{line.cached_tokens_per_second:,.0f} tokens/s" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--micro", "64"], "--micro 64: it is sequences x tokens, 8 or more"),
        (["--micro", "2x7"], "--micro 2x7"),
        (["--rounds", "0"], "--rounds 0: it has to be 1 or more"),
        (["nothing"], "unknown recipe 'nothing'"),
    ],
)
def test_bad_arguments(capsys, argv: list[str], message: str) -> None:
    assert decode.main(argv) == 2
    assert message in capsys.readouterr().err
