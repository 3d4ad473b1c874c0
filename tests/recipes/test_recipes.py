"""Recipes: every value has a source, parameter counts are the published ones, and they run."""

import json
import subprocess
import sys

import pytest
import torch

from pgolf.config import SECTIONS, known_keys
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.recipes import RECIPES, get, run_name, title
from pgolf.recipes.show import list_keys, list_recipes, show_recipe
from pgolf.training import added_loss

PUBLISHED = {"pr478": 26_993_756, "pr531": 27_878_489, "pr543": 25_224_283, "pr1473": 27_067_484}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = GPT(get(name).config().model)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_system_is_documented(name):
    """No method setting of a published system is left to a default that may move."""
    stated = {v.key for v in get(name).values}
    decided = {k for k, (s, _) in known_keys().items()
               if s in ("model", "optim", "schedule", "average", "quant", "data")}
    assert decided <= stated
    assert all(v.source in "CLRSIP" for v in get(name).values + get(name).as_published)
    assert get(name).corrections and get(name).contest


@pytest.mark.parametrize("name", RECIPES)
def test_values_reach_the_config(name):
    recipe = get(name)
    for exact in {False, bool(recipe.as_published)}:
        config = recipe.config(as_published=exact)
        expected = {v.key: v.value for v in recipe.values}
        if exact:
            expected |= {v.key: v.value for v in recipe.as_published}
        for key, value in expected.items():
            assert getattr(getattr(config, known_keys()[key][0]), key) == value
        assert config.as_published == exact


def test_titles_do_not_name_data_which_are_said_beside_them():
    for recipe in RECIPES.values():
        assert "Wikipedia" not in recipe.title and "CPU" not in recipe.title


def test_no_value_is_given_twice():
    for recipe in RECIPES.values():
        for values in (recipe.values, recipe.as_published):
            keys = [v.key for v in values]
            assert len(keys) == len(set(keys))


def test_as_published_of_a_recipe_of_our_own_is_refused():
    with pytest.raises(ConfigError, match="no published form"):
        get("demo").config(as_published=True)


def test_a_key_may_be_given_with_its_section():
    assert get("demo").config({"model.layers": "6"}).model.layers == 6


@pytest.mark.parametrize("limit", [0, 16_000_001])
def test_the_limit_of_a_contest_recipe_cannot_be_lifted(limit):
    with pytest.raises(ConfigError, match="contest recipe"):
        get("pr531").config({"fit_to_budget": "false", "budget_bytes": limit})
    assert get("demo").config({"fit_to_budget": "false", "budget_bytes": limit})


def test_a_run_is_called_by_its_settings():
    demo = get("demo")
    place = {
        "seed": 3, "out": "x", "device": "cpu", "data": "y", "resume": True, "log_every": 3,
        "ops": "reference", "micro_tokens": 256, "val_every": 1,
    }  # fmt: skip
    assert title(demo.config(place)) == f"demo: {demo.title}" and run_name(demo.config()) == "demo"
    one = demo.config({"layers": 2} | place)
    assert title(one) == "demo with 1 setting changed: layers=2"
    two = demo.config({"layers": 2, "layer_scale": False})
    assert title(two) == "demo with 2 settings changed: layers=2, layer_scale=false"
    assert run_name(two) == "demo with 2 settings changed"
    exact = get("pr478").config(as_published=True)
    assert title(exact) == f"pr478: {get('pr478').title}", "not a change: it is said on its own"


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="did you mean pr1473"):
        get("pr1743")


def test_shown_text():
    assert all(name in list_recipes() for name in RECIPES)
    for name in PUBLISHED:
        text = show_recipe(name)
        assert "Corrected, and why:" in text and "as_published=true puts back:" in text
    assert all(key in list_keys() for cls in SECTIONS.values() for key in cls.__dataclass_fields__)


def test_names_of_settings_are_unique():
    names = [f for cls in SECTIONS.values() for f in cls.__dataclass_fields__]
    assert len(names) == len(set(names))


def two_steps(name: str, shards, out, *overrides: str) -> list[str]:
    """Words that train two short steps of a recipe at full size."""
    return [
        "train", name, f"data={shards}", f"out={out}", "max_seconds=0", "max_steps=2", "seq_len=64",
        "batch_tokens=128", "val_tokens=256", "stride=32", "score_live=false", "checkpoint_every=0",
        *overrides,
    ]  # fmt: skip


def run(name: str, shards, out, *overrides: str) -> tuple[dict, str]:
    """result.json and what was printed."""
    command = [sys.executable, "-m", "pgolf", *two_steps(name, shards, out, *overrides)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "result.json").read_text()), done.stdout


# The second step with QAT on, then the artifact, with little search for the best one.
QUICK = ("qat_start=0.5", "quantizer=lite", "grid=rows", "fit_to_budget=false")


def check(result: dict, printed: str, name: str) -> None:
    assert "late QAT on for" in printed
    assert result["parameters"] == PUBLISHED[name]
    assert result["bytes_total"] <= 16_000_000
    assert result["val_targets"] == 256


def test_full_size_recipe_trains_packs_and_scores(pgolf, source_shards, tmp_path, monkeypatch):
    """The whole structure on a CPU; the others' is in tests/model, their size above.

    In this process, with the fastest codec, and few tokens to measure the added loss on.
    """
    monkeypatch.setattr(added_loss, "TOKENS", 256)
    out, fast = tmp_path / "run", ("codec=zstd", "zstd_level=1")
    code, printed = pgolf(*two_steps("pr1473", source_shards, out, *QUICK, *fast))
    assert code == 0, printed
    check(json.loads((out / "result.json").read_text()), printed, "pr1473")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_full_size_recipe_trains_packs_and_scores(name, source_shards, tmp_path):
    """As a user runs it, with the codec of the smallest files."""
    check(*run(name, source_shards, tmp_path / name, *QUICK, "codec=rans"), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_form(name, source_shards, tmp_path):
    """as_published=true, with the published codec; for the last system, with every codec."""
    every = name == "pr1473"
    overrides = ["calibration_sequences=1", *["brotli_quality=9", "codec=auto"] * every]
    result, printed = run(name, source_shards, tmp_path / name, "as_published=true", *overrides)
    # of the four, only PR 543's fake-quant ran; two steps are at the end of its warm-down
    assert result["as_published"] and (len(result["codecs_tried"]) == 7) == every
    assert result["bytes_model"] == min(result["codecs_tried"].values())
    assert ("late QAT on" in printed) == (name == "pr543")
