"""Settings: overrides, limits, contradictions, files and environment."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf import config as module
from pgolf.config import (
    ENVIRONMENT,
    SECTIONS,
    Config,
    ModelConfig,
    environment_overrides,
    find_key,
    from_dict,
    known_keys,
    parse_overrides,
    to_dict,
    with_overrides,
)
from pgolf.errors import ConfigError
from pgolf.fields import check_limits, parse_value, section_from_dict


def changed(**overrides: object) -> Config:
    return with_overrides(Config(), overrides)


# --- keys ------------------------------------------------------------------------------------


def test_field_names_are_unique_over_all_sections() -> None:
    names = [f.name for cls in SECTIONS.values() for f in module.fields(cls)]
    assert len(names) == len(set(names)) == len(known_keys())


def test_every_field_is_documented_and_its_default_is_within_its_limits() -> None:
    for key, (_, spec) in known_keys().items():
        assert spec.metadata["doc"], key
        assert parse_value(key, spec, str(spec.default)) == spec.default, key
    module.check(Config())


@pytest.mark.parametrize("key", ["layers", "model.layers"])
def test_a_key_with_and_without_its_section(key: str) -> None:
    assert with_overrides(Config(), {key: "4"}).model.layers == 4


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("layer", "layers"),
        ("matrx_lr", "matrix_lr"),
        ("optim.layers", "layers"),
        ("xsa_layer", "xsa_layers"),
        ("MAX_STEPS", None),
        ("zzzzqqqq", None),
        ("", None),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        find_key(key)
    assert repr(key) in str(error.value)
    if near:
        assert f"did you mean {near}?" in str(error.value)


def test_overrides_leave_the_original_alone() -> None:
    base = Config()
    other = with_overrides(base, {"layers": 3, "seed": "7", "data": "x"})
    assert (base.model.layers, base.run.seed) == (11, 1337)
    assert (other.model.layers, other.run.seed, other.data.data) == (3, 7, "x")
    assert other.optim is base.optim


def test_arguments() -> None:
    assert parse_overrides(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for arguments, message in (
        (["layers"], "key=value"),
        (["=4"], "key=value"),
        (["a=1", "a=2"], "twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_overrides(arguments)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("layers", "4", 4),
        ("layers", 4, 4),
        ("max_tokens", "1e6", 1_000_000),
        ("max_tokens", "7.5E5", 750_000),
        ("matrix_lr", "2e-2", 0.02),
        ("matrix_lr", 1, 1.0),
        ("backout", "true", True),
        ("backout", "On", True),
        ("backout", "1", True),
        ("tied_embedding", "FALSE", False),
        ("tied_embedding", "off", False),
        ("tied_embedding", "0", False),
        ("smear", "bos_masked", "bos_masked"),
        ("attn_bits", "8/4", "8/4"),
        ("data", "", ""),
    ],
)
def test_values_take_the_type_of_their_field(key: str, text: object, value: object) -> None:
    config = with_overrides(Config(), {key: text})
    section, spec = find_key(key)
    actual = getattr(getattr(config, section), spec.name)
    assert actual == value and type(actual) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("layers", "four"),
        ("layers", "4.5"),
        ("layers", ""),
        ("layers", None),
        ("layers", "1.5e0"),
        ("layers", "inf"),
        ("layers", "1e999"),
        ("matrix_lr", "fast"),
        ("matrix_lr", "nan"),
        ("matrix_lr", "inf"),
        ("matrix_lr", "-inf"),
        ("backout", "yes please"),
        ("backout", ""),
        ("layers", [4]),
        ("matrix_lr", {}),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, text: object) -> None:
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), {key: text})
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("layers", 0, "at least 1"),
        ("layers", 257, "at most 256"),
        ("vocab_size", 3, "at least 4"),
        ("vocab_size", 65537, "at most 65536"),
        ("rope_base", 1, "greater than 1"),
        ("softcap", -1, "at least 0"),
        ("matrix_lr", 0, "greater than 0"),
        ("momentum", 1, "at most 0.9999"),
        ("warmdown", 1.01, "at most 1"),
        ("qat_start", -0.1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**31, "at most"),
        ("smear", "maybe", "'off', 'plain', 'bos_masked'"),
        ("attn_bits", "3", "'4', '5'"),
        ("codec", "zip", "must be one of"),
        ("ema_horizon", 0, "greater than 0"),
        ("leaky_slope", 1.5, "at most 1"),
        ("attention", "flash", "must be one of"),
    ],
)
def test_limits(key: str, text: object, message: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        with_overrides(Config(), {key: text})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("layers", 1),
        ("layers", 256),
        ("vocab_size", 65536),
        ("momentum", 0.9999),
        ("warmdown", 0),
        ("warmdown", 1),
        ("softcap", 0),
        ("seed", 2**31 - 1),
        ("leaky_slope", 0),
    ],
)
def test_limits_are_inclusive(key: str, text: object) -> None:
    with_overrides(Config(), {key: text})


# --- what does not fit together --------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"dim": 100, "heads": 8},
        {"heads": 8, "kv_heads": 3},
        {"heads": 4, "kv_heads": 8},
        {"rope_dims": 15},
        {"rope_dims": 66},
        {"dim": 64, "heads": 8},  # rope_dims 16 over head 8
        {"bigram_buckets": 1},
        {"xsa_layers": "last:12"},
        {"ve_layers": "11"},
        {"layers": 4, "xsa_layers": "0-4"},
        {"batch_tokens": 1000, "seq_len": 300},
        {"stride": 4096},
        {"seq_len": 32},
    ],
)
def test_contradictions(overrides: dict) -> None:
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), overrides)
    assert any(key in str(error.value) for key in (*overrides, "rope_dims", "stride"))


def test_a_recipe_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match="max_seconds, max_tokens or max_steps"):
        module.check(Config(recipe="demo"))
    for key in ("max_seconds", "max_tokens", "max_steps"):
        module.check(with_overrides(Config(recipe="demo"), {key: 10}))


# --- files and environment -------------------------------------------------------------------


def test_a_config_survives_its_file() -> None:
    config = with_overrides(
        Config(recipe="demo", as_published=True),
        {
            "layers": 4,
            "matrix_lr": 0.013,
            "tied_embedding": False,
            "data": "späte/shards",
            "max_steps": 3,
        },
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_section_survives_alone() -> None:
    model = ModelConfig(layers=3, xsa_layers="last:2")
    assert section_from_dict(ModelConfig, json.loads(json.dumps(to_dict(changed())["model"]))) == (
        ModelConfig()
    )
    values = {f.name: getattr(model, f.name) for f in module.fields(ModelConfig)}
    assert section_from_dict(ModelConfig, values) == model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected an object"),
        (None, "expected an object"),
        ("x", "expected an object"),
        ({"layres": 3}, "layres"),
        ({"layers": "many"}, "layers"),
        ({"layers": 1e9}, "layers"),
        ({"smear": 3}, "smear"),
        ({"softcap": None}, "softcap"),
        ({"norm_eps": "nan"}, "norm_eps"),
        ({"layers": None}, "layers"),
        ({"layers": {}}, "layers"),
        ({"layers": 4.7}, "layers"),  # nothing is rounded or made true silently
        ({"layers": True}, "layers"),
        ({"backout": 1}, "backout"),
        ({"backout": None}, "backout"),
        ({"xsa_layers": 3}, "xsa_layers"),
        ({"xsa_layers": None}, "xsa_layers"),
    ],
)
def test_a_damaged_section_is_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section_from_dict(ModelConfig, values)


def test_environment() -> None:
    environ = {"SEED": "3", "MAX_WALLCLOCK_SECONDS": "60", "DATA_PATH": "", "PATH": "/bin"}
    overrides = environment_overrides(environ)
    assert overrides == {"seed": "3", "max_seconds": "60"}
    config = with_overrides(Config(), overrides)
    assert (config.run.seed, config.schedule.max_seconds) == (3, 60.0)


def test_environment_names_stand_for_real_keys() -> None:
    for key in ENVIRONMENT.values():
        find_key(key)
    assert {"SEED", "DATA_PATH", "MAX_WALLCLOCK_SECONDS", "VAL_LOSS_EVERY"} <= set(ENVIRONMENT)


# --- anything at all -------------------------------------------------------------------------

KEYS = st.sampled_from(sorted(known_keys()))
VALUES = st.one_of(
    st.text(max_size=12),
    st.text(string.digits + "-+.e:,_ alnoster", max_size=8),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(), max_size=2),
)


@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_overrides_are_taken_or_refused_with_a_configerror(overrides: dict) -> None:
    try:
        config = with_overrides(Config(), overrides)
    except ConfigError:
        return
    for key in overrides:
        section, spec = find_key(key)
        value = getattr(getattr(config, section), key)
        assert type(value) is type(spec.default), "a value has its field's type"
        check_limits(key, spec.metadata, value)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@given(st.lists(st.text(max_size=12), max_size=4))
def test_arguments_are_split_or_refused(arguments: list[str]) -> None:
    try:
        overrides = parse_overrides(arguments)
    except ConfigError:
        return
    assert [f"{k}={v}" for k, v in overrides.items()] == arguments


def test_one_key_by_two_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers is given twice"):
        changed(**{"layers": 4, "model.layers": 5})


@pytest.mark.parametrize(
    "change", [{"recipe": 3}, {"as_published": "yes"}, {"model": []}, {"extra": {}}, {"run": None}]
)
def test_a_damaged_configuration_is_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        from_dict(to_dict(Config()) | change)


def test_an_old_word_gets_the_new_one():
    with pytest.raises(ConfigError, match="seed_exact is now called as_published"):
        find_key("seed_exact")
    with pytest.raises(ConfigError, match="quant.min_scale is now called min_step"):
        changed(**{"quant.min_scale": "1"})
    with pytest.raises(ConfigError, match="smear=seed is now called smear=plain"):
        changed(smear="seed")
    values = to_dict(Config())
    values["seed_exact"] = values.pop("as_published")
    with pytest.raises(ConfigError, match="an earlier version of pgolf wrote seed_exact"):
        from_dict(values)
    values = to_dict(Config())
    values["quant"]["min_scale"] = values["quant"].pop("min_step")
    with pytest.raises(ConfigError, match="an earlier version of pgolf wrote min_scale"):
        from_dict(values)
