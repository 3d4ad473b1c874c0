"""Whole models: exact decoded values, error bounds, statistics and refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf.config import QuantConfig
from pgolf.errors import TrainingError
from pgolf.quant.dequantize import dequantize
from pgolf.quant.quantize import quantize, relative_error


def model_state(seed: int = 0, dim: int = 32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "tok_emb.weight": (0.05 * torch.randn(64, dim)).bfloat16(),
        "bigram.embed.weight": torch.zeros(16, 8),
        "backout": torch.tensor(0.2),
        "skip_weights": torch.randn(0, dim),
        "blocks.0.attn.c_q.weight": torch.randn(dim, dim),
        "blocks.0.mlp.fc.weight": 0.01 * torch.randn(96, dim),
        "blocks.0.resid_mix": torch.randn(2, dim),
    }


def test_values_are_codes_times_steps_and_fp16_passes_through():
    state = model_state()
    model = quantize(state, QuantConfig(small_numel=0), progress=False)
    assert list(model.tensors) == list(model.plans) == list(model.stats) == list(state)
    q = model.tensors["blocks.0.attn.c_q.weight"]
    assert (q.data.dtype, q.steps.dtype, q.bits) == (torch.int8, torch.float16, 6)
    assert q.data.abs().max() <= 31
    expected = torch.tensor(
        [[int(c) * float(s) for c in row] for row, s in zip(q.data, q.steps, strict=True)]
    )
    assert torch.equal(dequantize(q), expected)
    mix = model.tensors["blocks.0.resid_mix"]
    assert mix.bits == 16 and mix.steps is None
    assert torch.equal(dequantize(mix), state["blocks.0.resid_mix"].half().float())
    assert model.tensors["backout"].shape == () and model.tensors["skip_weights"].shape == (0, 32)
    assert not dequantize(model.tensors["bigram.embed.weight"]).any()


@given(
    bits=st.sampled_from(["4", "5", "6", "7", "8", "8/4"]),
    width=st.floats(-4.0, 2.0),
    seed=st.integers(0, 2**16),
)
def test_error_of_an_unclipped_weight_is_at_most_half_a_step(bits, width, seed):
    torch.manual_seed(seed)
    w = torch.randn(9, 40) * 10**width
    name = "blocks.0.attn.c_q.weight"
    config = QuantConfig(attn_bits=bits, clip_search="max", small_numel=0, int8_percentile=1.0)
    q = quantize({name: w}, config, progress=False).tensors[name]
    rounding = 5 if bits == "8/4" else 1  # to multiples of 4 after whole numbers: 2 + 1/2
    step = q.steps.float()[:, None] * rounding
    # fp16 rounds the step by at most 2^-11 of itself (more below 2^-14), qmax steps from zero.
    qmax = 2 ** (int(bits[0]) - 1) - 1
    cut = qmax * torch.maximum(step * 2.0**-11, torch.tensor(2.0**-25))
    assert ((dequantize(q) - w).abs() <= step / 2 * (1 + 1e-5) + cut).all()


def test_more_bits_are_never_worse_and_errors_are_reported_exactly():
    name, w = "blocks.0.mlp.fc.weight", torch.randn(64, 300)
    errors = []
    for bits in ("4", "5", "6", "7", "8", "16"):
        model = quantize({name: w}, QuantConfig(mlp_bits=bits, small_numel=0), progress=False)
        error = model.stats[name].relative_error
        expected = ((dequantize(model.tensors[name]) - w).norm() / w.norm()).item()
        assert error == pytest.approx(expected)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.04 and errors[-1] < 1e-3


def test_rows_at_the_floor_are_counted():
    name = "blocks.0.mlp.fc.weight"
    w = torch.randn(8, 300)
    w[:6] *= 0.01
    config = QuantConfig(small_numel=0, min_step=1.0)
    model = quantize({name: w}, config, progress=False)
    assert model.stats[name].floor_share == 0.75
    steps = model.tensors[name].steps
    assert (steps[:6] == torch.tensor(1 / 31).half()).all() and (steps[6:] > 1 / 31).all()
    assert quantize({name: w}, QuantConfig(small_numel=0), False).stats[name].floor_share == 0


def test_the_floor_counts_clips_and_not_maxima():
    w = torch.linspace(-1.05, 1.05, 401).repeat(2, 1)  # its 0.9 quantile is 0.945
    config = QuantConfig(small_numel=0, min_step=1.0, int8_percentile=0.9)
    model = quantize({"tok_emb.weight": w}, config, progress=False)
    assert model.stats["tok_emb.weight"].floor_share == 1.0


def test_multiples_of_four():
    name, w = "blocks.0.mlp.fc.weight", torch.randn(16, 300)
    config = QuantConfig(small_numel=0, mlp_bits="8/4", clip_percentiles="0.97")
    codes = quantize({name: w}, config, progress=False).tensors[name].data.int()
    inner = codes[codes.abs() != 127]  # the largest code is the one that is no multiple
    assert not (inner % 4).any() and len(inner.unique()) == 63 and len(inner) < codes.numel()


def test_full_range_uses_one_code_more():
    name, w = "blocks.0.mlp.fc.weight", torch.linspace(-1, 1, 400).repeat(4, 1)
    for full_range, least in ((False, -31), (True, -32)):
        config = QuantConfig(small_numel=0, full_range=full_range, clip_percentiles="0.9")
        codes = quantize({name: w}, config, progress=False).tensors[name].data
        assert (codes.min(), codes.max()) == (least, 31)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc.weight", "backout"])
def test_weights_that_are_not_finite_are_refused_by_name_and_count(name: str, bad: float):
    state = model_state()
    state[name].view(-1)[0] = bad
    with pytest.raises(TrainingError, match=rf"{name} has 1 of"):
        quantize(state, QuantConfig(small_numel=0), progress=False)


def test_values_beyond_fp16_are_refused():
    state = model_state() | {"backout": torch.tensor(7e4)}
    with pytest.raises(TrainingError, match="backout.*65504"):
        quantize(state, QuantConfig(), progress=False)


def test_relative_error_of_zeros_is_zero():
    state = {"bigram.embed.weight": torch.zeros(4, 4)}
    model = quantize(state, QuantConfig(small_numel=0), progress=False)
    assert relative_error(state["bigram.embed.weight"], model.tensors["bigram.embed.weight"]) == 0
