"""Which grid each tensor gets: the order of the rules, clips, floors, and errors."""

import pytest

from pgolf.config import QuantConfig
from pgolf.errors import ConfigError
from pgolf.quant.plan import TensorPlan, plan_tensors


def full_size_shapes(layers: int = 11, hidden: int = 1536) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a record-size model."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (1024, 512),
        "lm_head.weight": (1024, 512),
        "bigram.embed.weight": (2048, 128),
        "bigram.proj.weight": (512, 128),
        "bigram.scale": (),
        "smear.gate": (512,),
        "ve_shared.embed.weight": (1024, 128),
        "ve_shared.proj.weight": (256, 128),
        "ve_shared.scale": (),
        "ve_layer_scales.9": (),
        "skip_weights": (5, 512),
        "backout": (),
    }
    for i in range(layers):
        for name, shape in {
            "attn.c_q.weight": (512, 512),
            "attn.c_k.weight": (256, 512),
            "attn.c_v.weight": (256, 512),
            "attn.proj.weight": (512, 512),
            "mlp.fc.weight": (hidden, 512),
            "mlp.proj.weight": (512, hidden),
            "attn.q_gain": (8,),
            "attn_scale": (512,),
            "mlp_scale": (512,),
            "resid_mix": (2, 512),
        }.items():
            shapes[f"blocks.{i}.{name}"] = shape
    return shapes


def bits_of(config: QuantConfig) -> dict[str, tuple[int, int]]:
    return {n: (p.bits, p.multiple) for n, p in plan_tensors(config, full_size_shapes()).items()}


def test_every_tensor_gets_a_plan_in_order():
    shapes = full_size_shapes()
    assert list(plan_tensors(QuantConfig(), shapes)) == list(shapes)


def test_int6_everywhere_with_int8_tokens():
    """The layout of PR 478: int6 blocks and tables, int8 tokens, fp16 for all that is small."""
    plans = plan_tensors(QuantConfig(min_step=1.0, clip_search="matrix"), full_size_shapes())
    lite = dict(clip="search_matrix", percentiles=(0.999, 0.9995, 0.9999, 0.99999, 1.0), floor=1.0)
    assert plans["blocks.3.attn.c_k.weight"] == TensorPlan("int", "attn", 6, **lite)
    assert plans["blocks.10.mlp.proj.weight"] == TensorPlan("int", "mlp", 6, **lite)
    assert plans["bigram.embed.weight"] == TensorPlan("int", "bigram", 6, **lite)
    assert plans["ve_shared.embed.weight"] == TensorPlan("int", "ve", 6, **lite)
    for name in ("tok_emb.weight", "lm_head.weight"):
        assert plans[name] == TensorPlan(
            "int", "tok", 8, clip="quantile", percentiles=(0.9999984,), floor=1.0
        )
    small = ["bigram.proj.weight", "ve_shared.proj.weight"]
    for name in [*small, "smear.gate", "skip_weights", "backout", "blocks.0.resid_mix"]:
        assert plans[name].kind == "float16", name


def test_int5_mlp_and_fp16_exceptions():
    """The layout of PR 531: full range, int5 with the row maximum and no floor, fp16 overrides."""
    config = QuantConfig(
        mlp_bits="5", tok_bits="16", bigram_bits="8", full_range=True, min_step=1.0,
        bits_overrides="blocks.8.attn.c_k*=16",
    )
    plans = plan_tensors(config, full_size_shapes())
    assert plans["blocks.8.mlp.fc.weight"] == TensorPlan(
        "int", "mlp", 5, clip="max", percentiles=(1.0,), floor=0.0, full_range=True
    )
    assert plans["tok_emb.weight"].kind == plans["blocks.8.attn.c_k.weight"].kind == "float16"
    attn = plans["blocks.7.attn.c_k.weight"]
    assert (attn.bits, attn.full_range, attn.floor, attn.clip) == (6, True, 1.0, "search_row")
    # int8 codes stay within 127 in the published script too.
    assert plans["bigram.embed.weight"].full_range is False


def test_int8_multiples_of_four_between_int8_ends():
    """The layout of PR 543; patterns with * leave gains and mixes alone."""
    config = QuantConfig(
        attn_bits="8/4", mlp_bits="8/4", tok_bits="16", clip_search="matrix",
        clip_percentiles="0.9999,0.99999,0.999999,0.9999984,1",
        bits_overrides="blocks.0.*=8, blocks.10.*=8",
    )
    plans = plan_tensors(config, full_size_shapes())
    middle, end = plans["blocks.5.mlp.fc.weight"], plans["blocks.10.mlp.fc.weight"]
    assert (middle.bits, middle.multiple, middle.clip) == (8, 4, "search_matrix")
    assert middle.percentiles == (0.9999, 0.99999, 0.999999, 0.9999984, 1.0)
    assert (end.bits, end.multiple, end.clip) == (8, 1, "quantile")
    assert end.reason == "override blocks.10.*"
    assert plans["blocks.10.resid_mix"].kind == plans["blocks.0.attn.q_gain"].kind == "float16"


def test_large_table_projections_get_eight_bits():
    shapes = {"bigram.proj.weight": (1024, 128), "ve_shared.proj.weight": (512, 256)}
    for p in plan_tensors(QuantConfig(), shapes).values():
        assert (p.bits, p.reason) == (8, "other matrix")


def test_the_size_limit_is_inclusive_and_overrides_come_before_it():
    shapes = {"blocks.0.attn.c_q.weight": (256, 256), "blocks.1.attn.c_q.weight": (256, 257)}
    plans = plan_tensors(QuantConfig(small_numel=65536), shapes)
    assert [p.bits for p in plans.values()] == [16, 6]
    forced = plan_tensors(QuantConfig(bits_overrides="blocks.0.*=7"), shapes)
    assert forced["blocks.0.attn.c_q.weight"].bits == 7


def test_the_first_of_two_patterns_wins():
    bits = bits_of(QuantConfig(bits_overrides="blocks.4.attn.*=7,blocks.4.*=5,*.c_q.weight=8/4"))
    assert bits["blocks.4.attn.c_q.weight"] == (7, 1)
    assert bits["blocks.4.mlp.fc.weight"] == (5, 1)
    assert bits["blocks.5.attn.c_q.weight"] == (8, 4)


def test_one_step_a_matrix_has_codes_of_eight_bits():
    plans = plan_tensors(QuantConfig(grid="uniform", width=3.1, mlp_bits="5"), full_size_shapes())
    for name, step in (("attn.c_q", 0.1), ("mlp.fc", 3.1 / 15)):
        p = plans[f"blocks.0.{name}.weight"]
        assert (p.clip, p.bits, p.on_grid, p.floor) == ("uniform", 8, True, 0.0)
        assert p.relative_step == pytest.approx(step)


def test_steps_on_the_grid_and_widths_are_for_gptq():
    name = "blocks.0.attn.c_q.weight"
    for more, on_grid, widths in (
        ({}, True, (3.5, 4.0)),
        ({"quantizer": "lite"}, False, ()),
        ({"min_step": 1.0}, False, (3.5, 4.0)),
        ({"clip_search": "matrix"}, False, (3.5, 4.0)),
    ):
        p = plan_tensors(QuantConfig(clip_widths="3.5,4", **more), full_size_shapes())[name]
        assert (p.on_grid, p.widths) == (on_grid, widths), more


def test_max_clip_is_by_bits_as_written():
    plans = plan_tensors(QuantConfig(max_clip_bits="8/4,6", attn_bits="8/4", min_step=2.0),
                 full_size_shapes())
    assert plans["blocks.0.attn.c_q.weight"].clip == plans["blocks.0.mlp.fc.weight"].clip == "max"
    assert plans["blocks.0.attn.c_q.weight"].floor == 0.0
    assert plans["tok_emb.weight"].clip == "quantile"
    searched = plan_tensors(QuantConfig(clip_search="max", min_step=2.0), full_size_shapes())
    assert searched["blocks.0.attn.c_q.weight"].clip == "max"
    assert searched["blocks.0.attn.c_q.weight"].floor == 2.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits_overrides", "blocks.11.*=8", "blocks.11"),
        ("bits_overrides", "*.resid_mix=8", "matches no matrix"),
        ("bits_overrides", "blocks.0.*=9", "blocks.0.*=9"),
        ("bits_overrides", "blocks.0.*", "PATTERN=BITS"),
        ("bits_overrides", "=8", "PATTERN=BITS"),
        ("max_clip_bits", "5,x", "'x'"),
        ("clip_percentiles", "0.9,1.1", "1.1"),
        ("clip_percentiles", "0,1", "0,1"),
        ("clip_percentiles", "nan", "nan"),
        ("clip_percentiles", "half", "half"),
        ("clip_percentiles", "", "clip_percentiles"),
        ("clip_widths", "3,x", "3,x"),
        ("clip_widths", "0", "clip_widths"),
        ("clip_widths", "inf", "clip_widths"),
    ],
)
def test_malformed_settings_are_named(key: str, value: str, message: str):
    with pytest.raises(ConfigError) as caught:
        plan_tensors(QuantConfig(**{key: value}), full_size_shapes())
    assert message in str(caught.value)
    assert key in str(caught.value)
