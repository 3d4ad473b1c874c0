"""Opening a folder of shards: both layouts, and an error for each way to mix things up."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from pgolf.data.manifest import Dataset
from pgolf.data.shards import write_shard
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer
from pgolf.errors import DataError


@pytest.fixture
def contest(prepared, tmp_path):
    """The contest's layout, without a manifest."""
    root = tmp_path / "data"
    folder = root / "datasets" / "fineweb10B_sp400"
    folder.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    shutil.copy(prepared / "tokenizer.model", root / "tokenizers" / "fineweb_400_bpe.model")
    for name in ("train_000000", "train_000001", "val_000000"):
        shutil.copy(prepared / f"x_{name}.bin", folder / f"fineweb_{name}.bin")
    return folder


def contest_manifest(contest, **stats) -> None:
    manifest = {
        "datasets": [
            {"name": contest.name, "tokenizer_name": "bpe", "stats": stats},
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {}},
        ],
        "tokenizers": [{"name": "bpe", "model_path": "tokenizers/fineweb_400_bpe.model"}],
    }
    (contest.parent.parent / "manifest.json").write_text(json.dumps(manifest))


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ours(ours, documents):
    dataset = Dataset.open(str(ours))
    assert dataset.corpus == "x" and dataset.vocab_size == 400
    assert dataset.sha256 == hashlib.sha256("".join(documents).encode()).hexdigest()
    assert dataset.tokenizer_path == ours / "tokenizer.model"
    assert dataset.tokenizer_sha256 == sha256(ours / "tokenizer.model")
    assert dataset.train_shards == sorted(ours.glob("x_train_*.bin")) and dataset.train_shards[1:]
    assert dataset.val_shards == sorted(ours.glob("x_val_*.bin"))
    dataset.verify()
    copy = shutil.copy(ours / "tokenizer.model", ours.parent / "copy.model")
    assert Dataset.open(ours, tokenizer=copy).tokenizer_path == copy


def test_contest_layout(contest, prepared):
    for _ in ("without a manifest", "with one"):
        dataset = Dataset.open(contest)
        assert dataset.corpus == "fineweb10B_sp400" and dataset.vocab_size == 400
        assert dataset.tokenizer_path.name == "fineweb_400_bpe.model"
        assert len(dataset.train_shards) == 2 and dataset.manifest is None
        contest_manifest(contest, files_train=2, files_val=1)
    dataset.verify()
    digest = hashlib.sha256(bytes.fromhex(sha256(contest / "fineweb_val_000000.bin")))
    assert dataset.sha256 == digest.hexdigest()
    named = Dataset.open(contest, tokenizer=prepared / "tokenizer.model")
    assert named.tokenizer_path == prepared / "tokenizer.model"


def test_a_prefix_of_the_train_shards_is_fine_a_part_of_val_is_not(contest):
    contest_manifest(contest, files_train=80, files_val=1)
    assert len(Dataset.open(contest).train_shards) == 2
    contest_manifest(contest, files_train=80, files_val=2)
    with pytest.raises(DataError, match="1 val shards, .*manifest.json states 2; .*data fetch"):
        Dataset.open(contest)
    contest_manifest(contest, files_train=1, files_val=1)
    with pytest.raises(DataError, match="2 train shards, .*manifest.json states 1"):
        Dataset.open(contest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ('{"datasets": 1}', "'datasets' is no list of entries"),
        ('{"datasets": [1]}', "'datasets' is no list of entries"),
        ('{"datasets": [{"name": "fineweb10B_sp400", "stats": {"files_val": "1"}}]}', "'1' val"),
    ],
)
def test_damaged_contest_manifest(contest, content, message):
    (contest.parent.parent / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=f"manifest.json.*{message}"):
        Dataset.open(contest)


def test_no_tokenizer_in_the_contest_layout(contest):
    shutil.rmtree(contest.parent.parent / "tokenizers")
    with pytest.raises(
        DataError, match=r"looked for .*tokenizer.model and .*fineweb_400_bpe.model"
    ):
        Dataset.open(contest)


def test_a_manifest_cannot_lead_out_of_the_folder(contest, prepared):
    """A path in a manifest from the network is only a name."""
    contest_manifest(contest, files_train=2, files_val=1)
    path = contest.parent.parent / "manifest.json"
    path.write_text(path.read_text().replace("tokenizers/fine", "../../../tokenizers/fine"))
    expected = contest.parent.parent / "tokenizers" / "fineweb_400_bpe.model"
    assert Dataset.open(contest).tokenizer_path == expected


def last_val(folder):
    """The validation shard that is not full; how many there are depends on the text at hand."""
    return max(folder.glob("*_val_*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "x_train_000001.bin").unlink(), "shard 1 .* is missing|000001.bin is miss"),
        (lambda d: sorted(d.glob("*_train_*"))[-1].unlink(), "is missing .* shards stated"),
        (lambda d: [p.unlink() for p in d.glob("*_val_*")], r"no shards \*_val_\*"),
        (lambda d: (d / "tokenizer.model").unlink(), "cannot read tokenizer"),
        (lambda d: shutil.copy(last_val(d), d / f"x_val_{len(list(d.glob('*_val_*'))):06d}.bin"),
         "x_val_00000..bin is not in the manifest"),
        (lambda d: shutil.copy(last_val(d), d / "x_train_000000.bin"),
         "x_train_000000.bin: .* tokens, the manifest states 40000.*another data set"),
        (lambda d: shutil.copy(d / "x_train_000000.bin", d / "x_val_000000.bin"),
         "x_val_000000.bin: sha256 .* the manifest states"),
        (lambda d: write_shard(d / "y_train_000000.bin", np.arange(9)), "mixes the shards"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_missing_and_mixed_up(ours, damage, message):
    damage(ours)
    with pytest.raises(DataError, match=message):
        Dataset.open(ours)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=2), "manifest version 2, expected 1"),
        (lambda m: m.pop("corpus"), "damaged .*KeyError"),
        (lambda m: m.update(text_sha256=5), "damaged .*5 is not a str"),
        (lambda m: m["splits"].pop("val"), "damaged"),
        (lambda m: m["splits"]["val"].update(shards=None), "damaged"),
        (lambda m: m["splits"]["val"]["shards"][0].update(tokens="9"), "'9' is not a int"),
    ],
)
def test_damaged_manifest(ours, edit, message):
    manifest = json.loads((ours / "manifest.json").read_text())
    edit(manifest)
    (ours / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        Dataset.open(ours)


def test_another_tokenizer_is_refused(ours, documents, tmp_path):
    other = tmp_path / "other.model"
    train_tokenizer(documents[:1], other, 400)
    with pytest.raises(DataError, match="other.model has sha256 .* were made with"):
        Dataset.open(ours, tokenizer=other)
    shutil.copy(other, ours / "tokenizer.model")
    with pytest.raises(DataError, match="tokenizer.model has sha256"):
        Dataset.open(ours)


def other_tokenizer(documents, folder, vocab_size: int = 400):
    """Another model of a size, trained on a part of the same text: an alphabet in other order."""
    train_tokenizer(documents[1:], folder / "other.model", vocab_size)
    return folder / "other.model"


def test_a_wrong_tokenizer_of_the_right_size_is_refused(contest, documents, tmp_path):
    """No sha256 is stated here: what it makes of the text tells."""
    other = other_tokenizer(documents, tmp_path)
    message = r"other.model did not make the tokens in .*: it gives back [89]\d\.\d% of the pairs"
    with pytest.raises(DataError, match=message):
        Dataset.open(contest, tokenizer=other)
    shutil.copy(other, contest.parent.parent / "tokenizers" / "fineweb_400_bpe.model")
    with pytest.raises(DataError, match="fineweb_400_bpe.model did not make .*--tokenizer FILE"):
        Dataset.open(contest)


def test_verify_finds_a_train_shard_of_another_tokenizer(contest, documents, tmp_path):
    sp = load_tokenizer(other_tokenizer(documents, tmp_path))
    write_shard(contest / "fineweb_train_000001.bin", np.array(sp.encode(documents[0])))
    dataset = Dataset.open(contest)
    with pytest.raises(DataError, match="did not make the tokens in .*train_000001.bin"):
        dataset.verify()


def test_shards_that_begin_and_end_anywhere_are_the_tokenizer_s(contest, prepared):
    """In the middle of a word or of a character, without BOS; short ones, and of one token."""
    sp = load_tokenizer(prepared / "tokenizer.model")
    text = "\u65e5\u672c\u8a9e, three bytes each, \u306a\u306e\u3067"
    ids = sp.encode(text)
    assert sp.is_byte(ids[1]) and sp.is_byte(ids[-2])
    for cut in (ids[1:-1], ids[2:-2], ids[:1], [1], [1, 2, 1]):
        write_shard(contest / "fineweb_val_000000.bin", np.array(cut))
        Dataset.open(contest)


def test_a_tokenizer_too_small_for_the_shards_is_refused(contest, documents, tmp_path):
    write_shard(contest / "fineweb_val_000000.bin", np.array([1, 350, 7]))
    train_tokenizer(documents, tmp_path / "small.model", 320)
    with pytest.raises(DataError, match="val_000000.bin: token 350 at position 1, .* 320"):
        Dataset.open(contest, tokenizer=tmp_path / "small.model")


def test_a_tokenizer_that_loses_bytes_is_refused(contest, shared_data):
    model = shared_data / "negative" / "no_byte_fallback_1024.model"
    with pytest.raises(DataError, match="no_byte_fallback_1024.model: .*byte-fallback"):
        Dataset.open(contest, tokenizer=model)


def test_verify_reads_what_open_does_not(ours, contest):
    """One flipped bit in a train shard; in the contest's layout a token out of range."""
    dataset = Dataset.open(ours)
    raw = bytearray(dataset.train_shards[1].read_bytes())
    raw[5000] ^= 1
    dataset.train_shards[1].write_bytes(raw)
    Dataset.open(ours)
    with pytest.raises(DataError, match="x_train_000001.bin: sha256 .* the manifest states"):
        dataset.verify()
    write_shard(contest / "fineweb_train_000001.bin", np.array([1, 400]))
    with pytest.raises(DataError, match="train_000001.bin: token 400"):
        Dataset.open(contest).verify()


def test_the_sample_shards_open_with_their_tokenizer(shared_data):
    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    dataset = Dataset.open(shared_data / "fineweb_edu_1MB", tokenizer=model)
    assert (dataset.corpus, dataset.vocab_size) == ("fineweb_edu_1MB", 1024)
    assert load_tokenizer(dataset.tokenizer_path).bos_id() == 1
    dataset.verify()
