"""A budget that is given is filled; one that is too small names the way to pack what was kept."""

import pickle
import shlex

import pytest

from pgolf.config import Config, find_key, from_dict, to_dict, with_overrides
from pgolf.errors import BudgetError, ConfigError
from pgolf.recipes import get
from pgolf.training.finish import packing_again
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import Session


@pytest.mark.parametrize(
    ("recipe", "overrides", "fits"),
    [
        ("demo", {}, False),
        ("demo", {"layers": 2}, False),
        ("demo", {"budget": "500000"}, True),
        ("demo", {"artifact.budget": "500000"}, True),
        ("demo", {"budget_bytes": 500_000, "fit_to_budget": "false"}, False),
        ("demo", {"budget_bytes": 0}, False),
        ("demo", {"budget": 500_000, "grid": "rows"}, False),
        ("demo", {"budget": 500_000, "quantizer": "lite"}, False),
        ("pr1473", {}, True),
        ("pr1473", {"grid": "rows"}, False),
        ("pr1473", {"quantizer": "lite"}, False),
        ("pr1473", {"fit_to_budget": "false"}, False),
    ],
)
def test_fitting_follows_the_grid(recipe: str, overrides: dict, fits: bool) -> None:
    config = get(recipe).config(overrides)
    assert config.artifact.fit_to_budget is fits
    assert from_dict(to_dict(config)) == config, "what is on file is taken as it is"


def test_one_key_by_two_words() -> None:
    assert find_key("budget") == find_key("budget_bytes")
    with pytest.raises(ConfigError, match="budget_bytes is given twice"):
        with_overrides(Config(), {"budget": 5, "budget_bytes": 5})


@pytest.mark.parametrize(
    ("recipe", "overrides", "excess", "last"),
    [
        ("demo", {"budget": 20_000}, 30_500, ["budget=52000"]),
        ("pr1473", {"grid": "rows"}, 9, ["grid=uniform", "quantizer=gptq", "budget=16000000"]),
        ("pr1473", {}, 9, None),
    ],
)
def test_the_line_that_packs_what_was_kept(recipe, overrides, excess, last, tmp_path) -> None:
    config = get(recipe).config(overrides)
    folder = RunFolder(tmp_path / "a run")
    session = Session(config, None, None, folder)
    assert "checkpoint_every=0" in packing_again(session, excess)
    kept = folder.path / "checkpoints" / "step-0000005"
    kept.mkdir(parents=True)
    said = packing_again(session, excess)
    assert f"safe in {kept}" in said
    if last is None:
        assert "pgolf pack" not in said, "the contest's limit cannot be lifted"
        return
    words = shlex.split(said.split("`")[1])
    out = str(folder.artifact)
    assert words == ["pgolf", "pack", str(folder.path), "--out", out, *last]


def test_the_error_reaches_other_ranks_whole() -> None:
    error = pickle.loads(pickle.dumps(BudgetError("too large", 7)))
    assert (str(error), error.excess) == ("too large", 7)
