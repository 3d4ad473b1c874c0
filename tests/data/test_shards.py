"""Shards: the file format to the byte, and one clear error for each way to be wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgolf.data.shards import find_shards, load_validation, open_shard, read_header, write_shard
from pgolf.errors import DataError


def test_format_is_the_contest_s(tmp_path):
    write_shard(tmp_path / "s.bin", np.array([1, 258, 65535]))
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    expected = header.tobytes() + bytes([1, 0, 2, 1, 255, 255])
    assert (tmp_path / "s.bin").read_bytes() == expected
    tokens = open_shard(tmp_path / "s.bin", None)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [1, 258, 65535]
    assert isinstance(tokens, np.memmap)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([], np.int64), "at least one token"),
        (np.zeros((2, 2), np.int64), r"shape \(2, 2\)"),
        (np.array([1.0, 2.0]), "float64"),
        (np.array([1, 65536]), "65536"),
        (np.array([-1, 5]), "-1"),
    ],
)
def test_what_cannot_be_written(tmp_path, tokens, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "s.bin", tokens)
    assert not list(tmp_path.iterdir())


def with_header(path: Path, at: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[4 * at : 4 * at + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "No such file.*pgolf data"),
        (lambda p: p.write_bytes(b""), "0 bytes, expected a header of 1024"),
        (lambda p: p.write_bytes(p.read_bytes()[:1023]), "1023 bytes, expected a header of 1024"),
        (lambda p: with_header(p, 0, 20240521), "magic number 20240521, expected 20240520"),
        (lambda p: with_header(p, 1, 2), "version 2, expected 1"),
        (lambda p: with_header(p, 2, 0), "0 tokens declared, expected 1 or more"),
        (lambda p: with_header(p, 2, -1), "-1 tokens declared"),
        (lambda p: with_header(p, 2, 11), "1044 bytes, expected 1046 for the 11 tokens"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "1043 bytes, expected 1044"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "1045 bytes, expected 1044"),
    ],
)
def test_each_damage_is_named(tmp_path, damage, message):
    path = tmp_path / "s.bin"
    write_shard(path, np.arange(10))
    damage(path)
    for check in (read_header, lambda p: open_shard(p, 10)):
        with pytest.raises(DataError, match=message) as e:
            check(path)
        assert str(path) in str(e.value)


def test_a_token_outside_of_the_vocabulary_is_named(tmp_path):
    tokens = np.zeros((1 << 24) + 5, np.uint16)
    tokens[(1 << 24) + 3] = 1024
    write_shard(tmp_path / "s.bin", tokens)
    assert open_shard(tmp_path / "s.bin", 1025).size == tokens.size
    with pytest.raises(DataError, match="token 1024 at position 16777219, .* size 1024.*tokenizer"):
        open_shard(tmp_path / "s.bin", 1024)


def test_shards_are_found_in_order(tmp_path):
    for name in ("a_train_000001", "a_train_000000", "a_val_000000", "a_train_000002"):
        write_shard(tmp_path / f"{name}.bin", np.arange(3))
    (tmp_path / "a_train_notes.bin").write_text("no shard")
    (tmp_path / "tokenizer.model").write_text("no shard")
    names = [p.name for p in find_shards(tmp_path, "train")]
    assert names == [f"a_train_{i:06d}.bin" for i in range(3)]
    assert [p.name for p in find_shards(tmp_path, "val")] == ["a_val_000000.bin"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no shards \*_train_\*.bin in .*pgolf data prepare.*pgolf data fetch"),
        (["a_val_000000"], r"no shards \*_train_\*.bin"),
        (["a_train_000000", "b_train_000001"], "mixes the shards of 'a' and 'b'"),
        (["a_train_000000", "a_train_000002"], r"shard 1 of 'a' \(train\) is missing"),
    ],
)
def test_missing_and_mixed_up_shards(tmp_path, names, message):
    for name in names:
        write_shard(tmp_path / f"{name}.bin", np.arange(3))
    with pytest.raises(DataError, match=message):
        find_shards(tmp_path, "train")


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; .*pgolf data prepare"):
        find_shards(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, expected a folder"):
        find_shards(tmp_path / "file", "train")


@pytest.mark.parametrize(
    ("max_tokens", "targets"), [(0, 24), (24, 24), (23, 16), (100, 24), (8, 8), (15, 8)]
)
def test_validation_is_all_shards_cut_to_whole_sequences(tmp_path, max_tokens, targets):
    """31 tokens have 30 targets: three sequences of 8."""
    write_shard(tmp_path / "a_val_000001.bin", np.arange(20, 31))
    write_shard(tmp_path / "a_val_000000.bin", np.arange(20))
    tokens = load_validation(tmp_path, 31, 8, max_tokens)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(range(targets + 1))


def test_too_little_validation_text(tmp_path):
    write_shard(tmp_path / "a_val_000000.bin", np.arange(8))
    assert load_validation(tmp_path, 8, 7).size == 8
    with pytest.raises(DataError, match="8 validation tokens, expected at least 9"):
        load_validation(tmp_path, 8, 8)
    with pytest.raises(DataError, match=r"max_tokens=3\), expected at least 5"):
        load_validation(tmp_path, 8, 4, max_tokens=3)


def test_scoring_modules_stay_light():
    """Their size counts against the contest's limit, so nothing heavy may come along."""
    modules = "pgolf.scoring.bpb, pgolf.data.shards, pgolf.data.tokenizer, pgolf.data.manifest"
    code = (
        f"import sys, {modules}; print(sorted({{'torch', 'huggingface_hub'}} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_sample_shards_open(shared_data):
    folder = shared_data / "fineweb_edu_1MB"
    assert [read_header(p) for p in find_shards(folder, "train")] == [369_579]
    assert load_validation(folder, 1024, 2048).size == 41_066 // 2048 * 2048 + 1
