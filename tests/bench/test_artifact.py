"""`python -m bench artifact`: its figures for a small artifact, synthetic weights, bad input."""

import json
import math

import pytest
import torch

from bench.artifact import main
from bench.artifact_sources import RMS, SPREADS, synthetic
from pgolf.artifact.pack import write_artifact
from pgolf.config import ArtifactConfig
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.quantize import QuantizedModel
from pgolf.quant.step_grid import PER_OCTAVE, step_values

SMALL = {"grid": "rows", "clip_search": "max",
         "layers": "2", "dim": "64", "heads": "4", "kv_heads": "2", "mlp_hidden": "256",
         "vocab_size": "512", "rope_dims": "8", "small_numel": "0"}  # fmt: skip


def test_figures_are_those_of_the_file(tmp_path, capsys):
    torch.manual_seed(0)
    codes = (4 * torch.randn(200, 300)).char()
    q = QuantizedTensor(codes, 6, step_values(torch.full((200,), -50)))
    path = tmp_path / "artifact"
    model = QuantizedModel({"a.weight": q}, {}, {})
    report = write_artifact(path, model, {}, ArtifactConfig("rans"), progress=False)
    assert main([str(path), "--codec", "rans", "--json", str(tmp_path / "lines")]) == 0
    form, tensor = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert (form["form"], form["file_bytes"], form["weights"]) == ("rans", report.total, 60_000)
    assert form["decoded_bytes"] > 60_200 and 0 < form["decode_seconds"] < 60
    assert 60_000 < form["decoder_bytes"] < 64e6
    share = torch.unique(codes, return_counts=True)[1] / 60_000
    assert tensor["entropy_bits"] == pytest.approx(float(-(share * share.log2()).sum()), abs=1e-5)
    assert form["entropy_bytes"] == pytest.approx(7500 * tensor["entropy_bits"])
    assert 0.99 < tensor["coded_bits"] / tensor["entropy_bits"] < 1.01
    text = capsys.readouterr().out
    assert f"{report.total:,}" in text and f"{tensor['entropy_bits']:.4f}" in text


def test_synthetic_weights_have_the_stated_spread():
    """In the steps of rows, which follow their largest weight."""
    layouts = [synthetic("demo", noise, SMALL) for noise in ("gaussian", "laplacian")]
    entry = next(e for e in layouts[0].header.tensors if e.name == "blocks.0.mlp.fc.weight")
    octaves = (entry.steps + layouts[0].stored[entry.name, "steps"].double()) / PER_OCTAVE
    assert math.log(2) * octaves.std() == pytest.approx(SPREADS["mlp.fc"][0], rel=0.2)
    assert 2 * RMS < 31 * 2 ** octaves.mean() < 4 * RMS, "the largest of 64 in 31 steps"
    kurtosis = []
    for layout in layouts:
        codes = layout.stored["blocks.0.attn.c_q.weight", "codes"].double()
        kurtosis.append(float(codes.pow(4).mean() / codes.square().mean() ** 2))
    assert kurtosis[0] < 3.5 < 4 < kurtosis[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name artifacts or run folders"),
        (["missing"], "cannot read missing"),
        (["missing", "layers=3"], "is quantised already"),
        (["--synthetic", "pr0"], "pr0"),
    ],
)
def test_bad_input_is_one_line(arguments, message: str, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("python -m bench artifact:")
    assert message in lines[0]
