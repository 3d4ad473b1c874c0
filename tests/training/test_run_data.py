"""Shards and tokenizer of a run are found by their hash, wherever folders were moved to."""

import json
import shutil
from pathlib import Path

import pytest

from bench.synthetic import Words
from pgolf.config import Config, with_overrides
from pgolf.data.manifest import Dataset
from pgolf.data.prepare import prepare
from pgolf.errors import ConfigError, DataError
from pgolf.training import repack
from pgolf.training.run_data import Identity, find_dataset
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import data_again


@pytest.fixture
def project(shards, tmp_path):
    """A project with data and a run; call it to move everything."""
    shutil.copytree(shards, tmp_path / "a" / "data" / "words")
    run = tmp_path / "a" / "runs" / "one"
    dataset = Dataset.open(tmp_path / "a" / "data" / "words")
    settings = with_overrides(
        Config(recipe="demo"),
        {"data": str(dataset.folder), "tokenizer": str(dataset.tokenizer_path), "max_steps": 1},
    )
    RunFolder(run).open(settings, dataset)

    def move() -> Path:
        (tmp_path / "a").rename(tmp_path / "elsewhere")
        return tmp_path / "elsewhere" / "runs" / "one"

    move.run, move.settings = run, settings
    return move


def test_at_its_place_and_with_the_run(project):
    here = find_dataset(project.run, project.settings.data)
    assert here.folder == project.run.parents[1] / "data" / "words"
    run = project()
    moved = find_dataset(run, project.settings.data)
    assert moved.folder == run.parents[1] / "data" / "words"
    assert (moved.sha256, moved.corpus) == (here.sha256, "words")
    assert moved.tokenizer_path == run / "tokenizer.model"


def test_a_place_that_is_named(project, tmp_path):
    run = project()
    shutil.move(run.parents[1] / "data" / "words", tmp_path / "new name")
    with pytest.raises(DataError, match="no folder .*/a/data/words; name .* data=FOLDER"):
        find_dataset(run, project.settings.data)
    dataset = find_dataset(run, project.settings.data, tmp_path / "new name")
    assert dataset.folder == tmp_path / "new name"
    # and so in a run that goes on
    given = with_overrides(project.settings, {"data": str(tmp_path / "new name")})
    assert data_again(given, run).folder == tmp_path / "new name"


@pytest.mark.parametrize("change", ["text", "tokenizer"])
def test_other_data_are_refused(project, tmp_path, change):
    """At the recorded place, with the same name, and where they are named."""
    run = project.run
    place = Path(project.settings.data.data)
    seed, vocab = (1, 400) if change == "text" else (0, 390)
    shutil.rmtree(place)
    prepare(Words(seed), place, "words", vocab_size=vocab)
    if change == "text":
        (run / "tokenizer.model").write_bytes((place / "tokenizer.model").read_bytes())
    for data in ("", place):
        with pytest.raises(DataError, match="sha256"):
            find_dataset(run, project.settings.data, data)


def test_shards_without_their_manifest(project):
    """The contest's layout states no hash of the text: that of the validation shards serves."""
    run = project.run
    (Path(project.settings.data.data) / "manifest.json").unlink()
    assert find_dataset(run, project.settings.data).corpus == "words", "the run's own id"


def test_packing_that_reads_no_text_needs_no_shards(project):
    run = project()
    shutil.rmtree(run.parents[1] / "data")
    lite = with_overrides(project.settings, {"quantizer": "lite"})
    known = repack.open_data(run, lite, "")
    stated = Identity.read(run)
    assert (known.corpus, known.tokenizer_sha256) == ("words", stated.tokenizer_sha256)
    assert known.vocab_size == 400
    gptq = with_overrides(project.settings, {"quantizer": "gptq", "calibration": "train"})
    with pytest.raises(DataError, match="data=FOLDER"):
        repack.open_data(run, gptq, "")
    assert repack.settings(run, {})[0].data.data == project.settings.data.data


def test_runs_without_a_note(project):
    """An older run: result.json states as much; without it only the recorded place is right."""
    stated = json.loads((project.run / "data.json").read_text())
    (project.run / "data.json").unlink()
    assert find_dataset(project.run, project.settings.data).corpus == "words"
    run = project()
    with pytest.raises(DataError, match="no folder"):
        find_dataset(run, project.settings.data)
    del stated["val_sha256"]
    (run / "result.json").write_text(json.dumps(stated))
    assert find_dataset(run, project.settings.data).folder == run.parents[1] / "data" / "words"
    (run / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match="restore it"):
        Identity.read(run)
